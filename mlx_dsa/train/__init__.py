"""Train what stands beside a frozen model: indexers, search projections, retention heads."""

from .config import LayerScore, TrainConfig, TrainProgress, TrainResult
from .loop import train_indexers
from .projections import ProjectionsConfig, train_projections
from .retention import train_retention
from .retention_config import RetentionConfig, RetentionScore
from .together import BothScore, train_together

__all__ = [
    "BothScore",
    "LayerScore",
    "ProjectionsConfig",
    "RetentionConfig",
    "RetentionScore",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "train_indexers",
    "train_projections",
    "train_retention",
    "train_together",
]

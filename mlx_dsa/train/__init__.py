"""Train what stands beside a frozen model: lightning indexers and retention heads."""

from .config import LayerScore, TrainConfig, TrainProgress, TrainResult
from .loop import train_indexers
from .retention import train_retention
from .retention_config import RetentionConfig, RetentionScore
from .together import BothScore, train_together

__all__ = [
    "BothScore",
    "LayerScore",
    "RetentionConfig",
    "RetentionScore",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "train_indexers",
    "train_retention",
    "train_together",
]

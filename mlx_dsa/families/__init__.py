"""What an mlx-lm model and its attention are: one file a family of models."""

from .family import Family
from .layer import GatedLayer, Layer, Projected, Rope
from .registry import FAMILIES, family_of, model_types, positions_of

__all__ = [
    "FAMILIES",
    "Family",
    "GatedLayer",
    "Layer",
    "Projected",
    "Rope",
    "family_of",
    "model_types",
    "positions_of",
]

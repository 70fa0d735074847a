"""Qwen3.5, dense and with experts: as Qwen3-Next, inside a model that may see pictures."""

from __future__ import annotations

import mlx.nn as nn

from .family import Family
from .layer import GatedLayer


class Qwen35(Family):
    model_types = ("qwen3_5", "qwen3_5_moe")
    layer_type = GatedLayer

    def text_model(self, model: nn.Module) -> nn.Module:
        """Return its language model."""
        return model.language_model

"""Qwen3.5, dense and with experts: as Qwen3-Next, inside a model that may see pictures."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .family import Family
from .layer import GatedLayer


class Qwen35(Family):
    model_types = ("qwen3_5", "qwen3_5_moe")
    layer_type = GatedLayer

    def args(self, model: nn.Module) -> Any:
        """Return the args of its language model."""
        return model.language_model.args

    def decoder(self, model: nn.Module) -> nn.Module:
        """Return the decoder of its language model."""
        return model.language_model.model

    def logits(self, model: nn.Module, hidden: mx.array) -> mx.array:
        """Return the logits of hidden states ``[B, L, V]``."""
        return super().logits(model.language_model, hidden)

"""Llama 2 and 3, SmolLM2, Mistral."""

from __future__ import annotations

import mlx.nn as nn

from .family import Family


class Llama(Family):
    model_types = ("llama", "mistral")

    def refusal(self, model: nn.Module) -> str | None:
        """Refuse layers that see a sliding window only."""
        if any(block.use_sliding for block in model.layers):
            return "some of its layers attend to a sliding window"
        return None

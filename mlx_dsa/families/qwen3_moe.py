"""Qwen3-MoE: as Qwen3, with experts."""

from __future__ import annotations

from typing import Any

from .family import Family
from .layer import Rope


class Qwen3Moe(Family):
    model_types = ("qwen3_moe",)

    def rope(self, args: Any) -> Rope:
        """Return the rotary positions: mlx-lm builds them without the config's scaling."""
        return super().rope(args)._replace(scaling=None)

"""Qwen3-MoE: as Qwen3, with experts."""

from __future__ import annotations

from .family import Family


class Qwen3Moe(Family):
    model_types = ("qwen3_moe",)
    is_scaled = False

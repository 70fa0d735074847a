"""Qwen3-Next: every fourth layer has attention, with a gate; the others are linear."""

from __future__ import annotations

from .family import Family
from .layer import GatedLayer


class Qwen3Next(Family):
    model_types = ("qwen3_next",)
    layer_type = GatedLayer

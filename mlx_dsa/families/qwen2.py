"""Qwen2 and Qwen2.5: biases, and no norms of queries and keys."""

from __future__ import annotations

from .family import Family


class Qwen2(Family):
    model_types = ("qwen2",)

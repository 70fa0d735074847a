"""Qwen3: queries and keys pass a norm each."""

from __future__ import annotations

from .family import Family


class Qwen3(Family):
    model_types = ("qwen3",)

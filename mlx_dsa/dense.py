"""Layers with attention that stay dense in a patched model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .families import Layer


class DenseAttention(nn.Module):
    """Run a model's own attention, in a batch under a mask of its own.

    mlx-lm makes one mask for all layers, from the first one's cache: rows of unequal length
    want that of the cache at hand.

    Args:
        layer (Layer): The attention layer of a model.
    """

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer
        self.attention = layer.module

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Run the layer: see mlx-lm."""
        if hasattr(cache, "left_padding"):
            mask = cache.make_mask(x.shape[1])
        return self.attention(x, mask, cache)

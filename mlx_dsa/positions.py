"""Positions: for how long a text a model has them, and how heads of other widths turn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# Scalings whose factor stretches the positions of the unscaled model.
_STRETCHED_BY = ("original_max_position_embeddings", "factor")


def max_positions(args: Any, is_scaled: bool = True) -> int | None:
    """Return the tokens that a model can tell the places of.

    Args:
        args: The ``args`` of an mlx-lm model, or its ``config.json`` as a mapping.
        is_scaled (bool): Whether the model is built with the RoPE scaling that they
          state. Default: ``True``.

    Returns:
        int, optional: ``max_position_embeddings``, or more where RoPE is scaled to
        more; ``None`` where the model states no limit.
    """
    values = args if isinstance(args, Mapping) else vars(args)
    values = values.get("text_config") or values
    limit = values.get("max_position_embeddings")
    scaling = values.get("rope_scaling") or {}
    original, factor = (scaling.get(name) for name in _STRETCHED_BY)
    if original and factor and is_scaled:
        limit = max(limit or 0, int(original * factor))
    return limit or None


def check_positions(where: str, limit: int | None, n_tokens: int, instead: str) -> None:
    """Refuse a text for which a model has no positions.

    Args:
        where (str): Who asks, for the message.
        limit (int, optional): The model's positions; ``None`` for no limit.
        n_tokens (int): Tokens from the beginning of the conversation to its end.
        instead (str): What to do, a sentence.

    Raises:
        ValueError: If they are more than the model's positions.
    """
    if limit is not None and n_tokens > limit:
        raise ValueError(
            f"[{where}] {n_tokens:,} tokens are more than the model's {limit:,} positions: "
            f"it would answer wrongly. {instead}"
        )


class PositionLimit:
    """Warn once where a text goes on beyond a model's positions.

    Args:
        limit (int, optional): The model's positions; ``None`` for no limit.
        of_text (bool): Whether a layer goes on counting the whole text, whatever this one's
          cache does. Default: ``False``.
    """

    def __init__(self, limit: int | None, of_text: bool = False):
        self._limit = limit
        self._of_text = of_text

    @property
    def is_set(self) -> bool:
        """Whether there is a limit of which nobody has been told yet."""
        return self._limit is not None

    def check(self, cache: Any, n_tokens: int):
        """Note that the next tokens are read.

        Args:
            cache (SparseKVCache): Of what was read before.
            n_tokens (int): How many they are.
        """
        if self._limit is None:
            return
        if n_tokens + (cache.offset if self._of_text else cache.number) > self._limit:
            warnings.warn(
                f"mlx-dsa: the text has become longer than the model's {self._limit:,} "
                f"positions: from here on it answers wrongly.",
                stacklevel=3,
            )
            self._limit = None


def fit_scaling(scaling: dict | None, dims: int) -> dict | None:
    """Return a RoPE scaling for heads that rotate ``dims`` dims.

    It may have a factor for each pair of dims of the model's heads: a pair here takes that
    of the model's pair that turns as fast.

    Args:
        scaling (dict, optional): ``rope_scaling`` of a model.
        dims (int): Even.
    """
    if not scaling:
        return scaling
    fitted, n = dict(scaling), dims // 2
    for name in ("short_factor", "long_factor"):
        factors = fitted.get(name)
        if isinstance(factors, (list, tuple)):
            fitted[name] = [factors[i * len(factors) // n] for i in range(n)]
    return fitted


def check_turn(rope: nn.Module, positions: str):
    """Refuse compact positions with a RoPE whose keys can't be rotated on.

    Args:
        rope (nn.Module): Of an attention layer.
        positions (str): As in :class:`SparseConfig`.

    Raises:
        ValueError: If its angles are not in proportion to the position.
    """
    if positions == "compact" and not isinstance(rope, nn.RoPE) and not hasattr(rope, "_freqs"):
        raise ValueError(
            f"[SparseConfig] positions 'compact' can't be had of this model: the angles of its "
            f"{type(rope).__name__} are not in proportion to the position. Use "
            f"positions='absolute'."
        )


def turn(rope: nn.Module, x: mx.array, by: mx.array) -> mx.array:
    """Rotate keys on by a number of positions each.

    Args:
        rope (nn.Module): The RoPE that rotated them: one that turns each pair of dims by
          an angle in proportion to the position.
        x (mx.array): ``[B, H, n, D]``, rotated.
        by (mx.array): Positions ``[B, n]``, int32, also negative.

    Returns:
        mx.array: ``[B, H, n, D]``; bit for bit the same where ``by`` is 0.
    """
    B, H, n, D = x.shape
    # A key is turned often: in float32, so that it is rounded once each time.
    rows = x.astype(mx.float32).transpose(0, 2, 1, 3).reshape(B * n, H, 1, D)
    # CUDA takes no negative offsets (docs/log.md). To turn (a, b) back is to turn (a, -b).
    backwards = (by < 0).reshape(B * n, 1, 1, 1) & _second_of_pairs(rope, D)
    sign = mx.where(backwards, -1.0, 1.0)
    turned = sign * rope(sign * rows, offset=mx.abs(by).reshape(-1))
    if not isinstance(rope, nn.RoPE):
        # Some scalings also stretch what they turn: once is enough.
        turned = turned / rope(mx.ones((1, 1, 1, D)), offset=0)
    # In the layout of other keys: attention rounds alike, and copies nothing at every step.
    return mx.contiguous(turned.astype(x.dtype).reshape(B, n, H, D).transpose(0, 2, 1, 3))


def _second_of_pairs(rope: nn.Module, head_dim: int) -> mx.array:
    """Return which dims ``[head_dim]`` are the second of a pair that a RoPE turns."""
    dims = getattr(rope, "dims", 0) or getattr(rope, "dim", head_dim)
    place = mx.arange(head_dim)
    if getattr(rope, "traditional", False):
        return (place % 2 == 1) & (place < dims)
    return (place >= dims // 2) & (place < dims)

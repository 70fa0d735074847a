"""One attention of a model, as sparse attention needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..positions import turn


class Rope(NamedTuple):
    """The rotary positions of a model.

    Args:
        theta (float): Base.
        scaling (dict, optional): As in the model's config.
        max_positions (int): Positions that the model was made for.
    """

    theta: float
    scaling: dict | None
    max_positions: int


class Projected(NamedTuple):
    """What an attention makes of hidden states.

    Args:
        queries (mx.array): ``[B, Hq, L, D]``, rotated.
        keys (mx.array): ``[B, Hkv, L, D]``, rotated.
        values (mx.array): ``[B, Hkv, L, D]``.
        gate (mx.array, optional): What the output is multiplied with ``[B, L, Hq * D]``.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    gate: mx.array | None = None


class Layer:
    """Look at one attention of an mlx-lm model, and put another in its place.

    Its operations are those of mlx-lm's own layer, in the same order: the same bits.

    Args:
        index (int): The layer's number.
        block (nn.Module): The transformer block, with ``self_attn`` and
          ``input_layernorm``.
        rope (Rope): The model's rotary positions.

    Attributes:
        module (nn.Module): The model's own attention.
        n_heads, n_kv_heads, head_dim (int): Its shape.
        scale (float): Factor of its logits.
        dtype (mx.Dtype): Of the activations.
        norm_weight (mx.array): Of the norm that makes the hidden state ``[dim]``.
    """

    def __init__(self, index: int, block: nn.Module, rope: Rope):
        self.index = index
        self.rope = rope
        self._block = block
        self.module = block.self_attn
        while "attention" in self.module:  # what stands in its place wraps it
            self.module = self.module.attention
        self.scale = self.module.scale
        self.n_heads, self.n_kv_heads = self._n_heads()
        self.head_dim = round(self.scale**-2)
        self.norm_weight = block.input_layernorm.weight

    def _n_heads(self) -> tuple[int, int]:
        return self.module.n_heads, self.module.n_kv_heads

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state."""
        return self.norm_weight.size

    @property
    def dtype(self) -> mx.Dtype:
        return self.norm_weight.dtype

    @property
    def bits(self) -> int | None:
        """Bits of a weight of the attention, ``None`` where it is not quantised."""
        return getattr(self.module.q_proj, "bits", None)

    @property
    def current(self) -> nn.Module:
        """What stands in the attention's place now: itself, or what wraps it."""
        return self._block.self_attn

    def put(self, module: nn.Module):
        """Put a module in the attention's place."""
        self._block.self_attn = module

    def normalise(self, h: mx.array) -> mx.array:
        """Return the hidden state that the attention receives ``[B, L, dim]``."""
        return self._block.input_layernorm(h)

    def linear(self, x: mx.array) -> list[mx.array]:
        """Apply the projections alone: queries, keys and values ``[B, L, *]``."""
        return [self.module[name](x) for name in ("q_proj", "k_proj", "v_proj")]

    def project(
        self,
        x: mx.array,
        offset: int | mx.array = 0,
        linear: Callable[[mx.array], list[mx.array]] | None = None,
    ) -> Projected:
        """Compute queries, keys and values.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int or mx.array): Position of the first. Default: ``0``.
            linear (callable, optional): In place of :meth:`linear`. Default: ``None``.

        Returns:
            Projected: With RoPE applied.
        """
        B, L, _ = x.shape
        queries, keys, values = (linear or self.linear)(x)
        queries, gate = self._split(queries.reshape(B, L, self.n_heads, -1))
        keys = keys.reshape(B, L, self.n_kv_heads, -1)
        values = values.reshape(B, L, self.n_kv_heads, -1)
        if "q_norm" in self.module:
            queries, keys = self.module.q_norm(queries), self.module.k_norm(keys)
        queries, keys, values = (a.transpose(0, 2, 1, 3) for a in (queries, keys, values))
        queries = self.module.rope(queries, offset=offset)
        return Projected(queries, self.module.rope(keys, offset=offset), values, gate)

    def turn(self, x: mx.array, by: mx.array) -> mx.array:
        """Rotate keys or queries on, as :func:`mlx_dsa.positions.turn` does."""
        return turn(self.module.rope, x, by)

    def _split(self, queries: mx.array) -> tuple[mx.array, mx.array | None]:
        return queries, None

    def output(self, attended: mx.array, gate: mx.array | None = None) -> mx.array:
        """Return what the attention adds to the hidden state.

        Args:
            attended (mx.array): ``[B, Hq, L, D]``.
            gate (mx.array, optional): From :class:`Projected`.

        Returns:
            mx.array: ``[B, L, dim]``.
        """
        B, _, L, _ = attended.shape
        attended = attended.transpose(0, 2, 1, 3).reshape(B, L, -1)
        if gate is not None:
            attended = attended * mx.sigmoid(gate)
        return self.module.o_proj(attended)


class GatedLayer(Layer):
    """An attention whose queries come with a gate for its output."""

    def _n_heads(self) -> tuple[int, int]:
        return self.module.num_attention_heads, self.module.num_key_value_heads

    def _split(self, queries: mx.array) -> tuple[mx.array, mx.array | None]:
        queries, gate = mx.split(queries, 2, axis=-1)
        return queries, gate.reshape(*gate.shape[:2], -1)

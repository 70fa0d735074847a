"""Scores from the few channels of a key that matter most, then exact attention to the best tokens.

Yang et al., Post-Training Sparse Attention with Double Sparsity, 2024: which channels matter is
found offline (``mlx-dsa calibrate --rule double_sparsity``), by the mean over tokens of the product
of a token's own rotated query and key, channel by channel; these channels of all keys lie beside
the cache (the label cache), and what they make of the attention selects. Deviations: channels
are a key head's, by the sum over its group's query heads; sets are one a layer, by the mean of the
heads' softmax over labels, or with ``by_head`` one a key head (the paper has a set a query head, for
which a softmax changes nothing); labels are of the layer's dtype, not 4 bits; sinks and the newest
keys are always read; prompts are read so, too, where they are read sparsely (the paper's are dense:
``prefill`` ``"dense"``); nothing is fetched ahead from another device.

The label cache has ``share`` of a key's numbers: at 1/16, 3% on top of keys and values. It is made
of hidden states, at the cost of one more projection to keys a token; to pick the channels out of
the keys would read every key whole at each step, as single numbers come in lines of 64 bytes, and
from 4,096 entries on that is more than the projection's weights (of a model 4,096 wide). It also
leaves keys cold in ``cache`` ``"tiered"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..checkpoint_file import DOUBLE_SPARSITY
from ..registry import register
from ..selection import select_topk
from .attending import attention_probabilities
from .rule import Probe, fold_heads
from .select_rule import SelectRule


@register("select", DOUBLE_SPARSITY)
@dataclass(frozen=True)
class DoubleSparsity(SelectRule):
    """Read the keys that the attention over a few calibrated channels pays most to.

    Args:
        share (float): Of a key's channels those that are looked at, above 0 and up to 1; one
          at least. Default: ``0.0625``.
        by_head (bool): Whether each key head has a set of its own. Default: ``False``.
    """

    share: float = 0.0625
    by_head: bool = False
    wants_indexer = True
    keeps_entry = True
    reads = DOUBLE_SPARSITY
    _channels: ClassVar[mx.array]  # once bound, [Hkv, n]

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(
                f"[SparseConfig] 'select' 'double_sparsity': option 'share' must be above 0 and at most 1 "
                f"but got {self.share!r}."
            )

    def check(self, config):
        if config.positions == "compact":
            raise ValueError(
                "[SparseConfig] select 'double_sparsity' keeps channels of keys as they were read, and "
                "positions 'compact' turn keys. Use positions='absolute'."
            )
        if self.by_head and config.cache == "tiered":
            raise ValueError(
                "[SparseConfig] select 'double_sparsity' with by_head=true selects by head, and cache "
                "'tiered' recalls entries of all heads together. Use cache='full', or by_head=false."
            )

    def bind(self, layer, indexer=None, backend="auto"):
        bound = super().bind(layer, indexer, backend)
        if indexer is None:
            return bound
        n = max(1, round(self.share * layer.head_dim))
        return bound._with(_channels=indexer.found["channels"][:, :n].astype(mx.int32))

    def entry_width(self):
        return self._channels.size

    def entry(self, x, offset):
        labels = self._of_channels(self.layer.project(x, offset).keys, self._channels)
        B, _, L, _ = labels.shape
        return labels.transpose(0, 2, 1, 3).reshape(B, 1, L, -1)

    def probe(self, x, offset, queries=None):
        probe = self.attention_queries(x, offset, queries)
        group = probe.queries.shape[1] // len(self._channels)
        return Probe(self._of_channels(probe.queries, mx.repeat(self._channels, group, axis=0)), probe.weights)

    def _of_channels(self, x: mx.array, channels: mx.array) -> mx.array:
        """Pick each head's own channels ``[H, n]`` of queries or keys ``[B, H, L, D]``."""
        return mx.take_along_axis(x, channels[None, :, None], axis=-1)

    def _labels(self, cache, end) -> mx.array:
        """Return the channels of keys ``[B, Hkv, end, n]``."""
        labels = cache.index_keys[:, 0, :end]
        n_kv_heads, n = self._channels.shape
        return labels.reshape(*labels.shape[:2], n_kv_heads, n).swapaxes(1, 2)

    def scores(self, probe, cache, n_visible, end):
        seen = mx.arange(end) < n_visible[:, None]
        return attention_probabilities(probe.queries, self._labels(cache, end), seen, self.layer.scale)

    def select(self, probe, cache, top_k, n_visible, end, forced):
        if not self.by_head:
            return super().select(probe, cache, top_k, n_visible, end, forced)
        labels = self._labels(cache, end)
        B, n_kv_heads = labels.shape[:2]
        seen = mx.arange(end) < n_visible[:, None]
        queries = fold_heads(probe.queries, n_kv_heads)
        scores = attention_probabilities(queries, fold_heads(labels, n_kv_heads), seen, self.layer.scale)
        slots = select_topk(scores, top_k, n_visible, forced[0], forced[1], self.backend)
        return slots.reshape(B, n_kv_heads, -1, top_k)

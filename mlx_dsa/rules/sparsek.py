"""The attention's own products, with a window and a stride.

GittyBurstein et al., Implement SparseK Attention mechanism, llama.cpp pull request 16817, 2025
(open): a query reads the keys of the largest products, those near it, and every
``stride``-th. Deviations: all of these count inside ``top_k``, so what the window and then the stride
leave goes to the largest products, and where there are more strided keys than room the newest of
them are read; sinks are always read; sets are one a layer, by the sum over its heads,
or with ``by_head`` one a key head. In tiles they are shared by the heads, and the window is
``n_recent`` and the tile itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx

from ..registry import register
from ..selection import select_topk
from .rule import at_least
from .select_rule import SelectRule

# Less than what is forced, more than any product.
_STRIDED = float(mx.finfo(mx.float32).max)
_NAMES = ("enable", "topk", "window", "stride")


@register("select", "sparsek")
@dataclass(frozen=True)
class SparseK(SelectRule):
    """Read the keys of the largest products, those near the query, and every so many-th.

    Args:
        window (int): Keys before the query's own that are always read; at least as many
          as ``n_recent`` says. Default: ``64``.
        stride (int): Distance of keys that are always read, from the first on; ``0`` for
          none. Default: ``128``.
        by_head (bool): Whether each key head has a set of its own. Default: ``False``.
    """

    window: int = 64
    stride: int = 128
    by_head: bool = False

    def __post_init__(self):
        at_least("select", "sparsek", window=(self.window, 0), stride=(self.stride, 0))

    def check(self, config):
        newest = max(self.window + 1, config.n_recent)
        if config.n_sink + newest > config.top_k:
            raise ValueError(
                f"[SparseConfig] 'select' 'sparsek' reads n_sink + window + 1 = "
                f"{config.n_sink + newest} keys whatever they score, but top_k is {config.top_k}. "
                f"Raise top_k, or write select='sparsek:window=N' with a smaller N."
            )

    def scores(self, probe, cache, n_visible, end):
        return self._scores(probe, cache, end).sum(axis=1) + self._strided(end)

    def _scores(self, probe, cache, end) -> mx.array:
        """Return products of keys and the sum of a group's queries ``[B, Hkv, L, end]``."""
        keys = cache.keys[:, :, :end].astype(mx.float32)
        B, n_heads, L, D = probe.queries.shape
        n_kv_heads = keys.shape[1]
        queries = probe.queries.astype(mx.float32)
        queries = queries.reshape(B, n_kv_heads, n_heads // n_kv_heads, L, D).sum(axis=2)
        return queries @ keys.swapaxes(-1, -2)

    def _strided(self, end) -> mx.array:
        if not self.stride:
            return mx.zeros(end)
        return mx.where(mx.arange(end) % self.stride == 0, _STRIDED, 0.0)

    def select(self, probe, cache, top_k, n_visible, end, forced):
        n_sink, n_recent = forced[0], max(forced[1], self.window + 1)
        if not self.by_head:
            scores = self.scores(probe, cache, n_visible, end)
            return select_topk(scores, top_k, n_visible, n_sink, n_recent, self.backend)
        scores = self._scores(probe, cache, end) + self._strided(end)
        flat = scores.flatten(0, 1)
        slots = select_topk(flat, top_k, n_visible, n_sink, n_recent, self.backend)
        return slots.reshape(*scores.shape[:3], top_k)


def sparsek_settings(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what a model says of SparseK attention.

    Args:
        values (Mapping): Its ``config.json`` (``sparsek_enable``, ``sparsek_topk``,
          ``sparsek_window``, ``sparsek_stride``), or the metadata of its GGUF file
          (``llama.sparsek.enable`` and so on, or with its own ``general.architecture`` in
          front).

    Returns:
        dict, optional: ``select``, and ``top_k`` where it is said, as fields of
        :class:`SparseConfig`; ``None`` where the model says nothing, or has it off
        (``enable`` false, or a ``topk`` of 0).

    Raises:
        ValueError: If a value is not valid.
    """
    prefixes = ("sparsek_", "llama.sparsek.", f"{values.get('general.architecture')}.sparsek.")
    found = {}
    for prefix in prefixes:
        for name in _NAMES:
            if prefix + name in values:
                found[name] = _number(prefix + name, values[prefix + name], name == "enable")
    if not found or not found.get("enable", True) or found.get("topk") == 0:
        return None
    known = {f.name for f in fields(SparseK)}
    options = ",".join(f"{name}={value}" for name, value in found.items() if name in known)
    settings: dict[str, Any] = {"select": f"sparsek:{options}" if options else "sparsek"}
    if "topk" in found:
        settings["top_k"] = found["topk"]
    return settings


def _number(key: str, value: Any, is_truth: bool) -> int | bool:
    if isinstance(value, mx.array) and value.size == 1:
        value = value.item()
    if is_truth and value in (0, 1) and isinstance(value, int):
        return bool(value)
    if is_truth:
        raise ValueError(f"[sparsek] {key!r} must be true or false but got {value!r}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"[sparsek] {key!r} must be a whole number of at least 0 but got {value!r}.")
    return value


def with_model_settings(given: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Put the options that a user gives ``sparsek`` over those that a model says.

    Args:
        given (str): The user's ``select``, ``"sparsek"`` and its options.
        said (Mapping): From :func:`sparsek_settings`.

    Returns:
        dict: ``select``, and ``top_k`` as the model says it.
    """
    theirs, own = (text.partition(":")[2].split(",") for text in (said["select"], given))
    named = {option.partition("=")[0] for option in own}
    options = [o for o in theirs if o and o.partition("=")[0] not in named] + [o for o in own if o]
    return {**said, "select": ":".join(["sparsek", ",".join(options)] if options else ["sparsek"])}

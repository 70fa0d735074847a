"""What rules of both kinds are.

A rule is a frozen dataclass whose fields are its options. Bound to a layer it is the same
rule, which knows that layer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from ..families import Layer


class Probe(NamedTuple):
    """What scoring needs of some queries.

    Args:
        queries (mx.array): ``[B, H, L, n]``.
        weights (mx.array): ``[B, L, H]``.
    """

    queries: mx.array
    weights: mx.array

    def rows(self, start: int, stop: int) -> Probe:
        """Return that of some of the queries."""
        return Probe(self.queries[:, :, start:stop], self.weights[:, start:stop])


def fold_heads(x: mx.array, n_kv_heads: int) -> mx.array:
    """Make key heads rows of the batch: ``[B, H, L, D]`` to ``[B * Hkv, H / Hkv, L, D]``."""
    B, n_heads, *rest = x.shape
    return x.reshape(B * n_kv_heads, n_heads // n_kv_heads, *rest)


def at_least(kind: str, name: str, **options: tuple[int, int]):
    """Refuse options of a rule that are too small.

    Args:
        kind (str): ``"select"`` or ``"evict"``.
        name (str): The rule.
        **options: Their values and the least that each may be.
    """
    for option, (value, least) in options.items():
        if value < least:
            raise ValueError(
                f"[SparseConfig] {kind!r} {name!r}: option {option!r} must be at least {least} but got {value}."
            )


@dataclass(frozen=True)
class Rule:
    """A rule of either kind.

    Attributes:
        wants_indexer (bool): Whether it reads the layer's indexer.
        layer (Layer): Once bound, the attention layer; ``indexer``, bound too, or ``None``.
        backend (str): Once bound, the kernels to use.
    """

    wants_indexer: ClassVar[bool] = False
    layer: ClassVar[Layer]
    indexer: ClassVar[Any]  # an Indexer or what else the rule reads
    backend: ClassVar[str]

    def check(self, config: Any):
        """Refuse settings that the rule can't run with.

        Args:
            config (SparseConfig): All of them.

        Raises:
            ValueError: Which says what to change.
        """

    def bind(self, layer: Layer, indexer: Any = None, backend: str = "auto"):
        """Return the rule for a layer.

        Args:
            layer (Layer): An attention layer of a model.
            indexer (Indexer, or what else it reads, optional): The layer's, bound to it. Default: ``None``.
            backend (str): Kernels to use. Default: ``"auto"``.
        """
        return self._with(layer=layer, indexer=indexer, backend=backend)

    def _with(self, **attributes: Any):
        bound = copy.copy(self)
        for name, value in attributes.items():
            object.__setattr__(bound, name, value)
        return bound

    def attention_queries(self, x: mx.array, offset: int, queries: mx.array | None = None):
        """Return the layer's own queries as a probe.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.
            offset (int): Position of the first one.
            queries (mx.array, optional): What the layer made of them ``[B, Hq, L, D]``,
              rotated, where that is at hand.
        """
        if queries is None:
            queries = self.layer.project(x, offset).queries
        return Probe(queries, mx.ones((queries.shape[0], x.shape[1], 1), x.dtype))

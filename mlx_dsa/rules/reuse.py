"""Some layers select, those after them read the same keys.

Ai et al., HyLRA: Hybrid Layer Reuse Attention for Efficient Long-Context Inference, 2026 (arXiv
2602.00777v1): a layer attends to everything, or to what the last such layer paid most to; which
layers are which is chosen offline, by dynamic programming over profiles of the layers' likeness.
Deviations: a layer that does not reuse selects by another rule, and attends to that selection;
with ``of=oracle`` the selection is the paper's, but what such a layer attends to is not everything.
Layers in ``dense_layers`` attend to everything, and hand nothing on. Sinks and the newest keys
are read as the other rule reads them. Which layers select is an option; :func:`choose_layers`
finds them from a profile, but weighs layers by likeness alone, where the paper also profiles how
much a layer suffers from being sparse. A layer that reuses keeps no entries of the
other rule and scores nothing. Slots are the same tokens in all layers only where nothing is
evicted: cache ``"full"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..registry import make_rule, register
from .rule import at_least
from .select_rule import SelectRule


@register("select", "reuse")
@dataclass(frozen=True)
class Reuse(SelectRule):
    """Read what the last layer that selects has selected.

    Args:
        of (str): The rule by which layers select, with an option if any. Default: ``"lightning"``.
        layers (str): Numbers of those that do, with ``+`` between them, as ``0+3+7``; the first
          sparse one always does. Default: ``""``, for one in ``every``.
        every (int): Sparse layers for each that selects. Default: ``2``.
    """

    of: str = "lightning"
    layers: str = ""
    every: int = 2
    rule: ClassVar[SelectRule]  # that of `of`
    reuses: ClassVar[bool] = False  # once bound, whether the layer does not select
    _place: ClassVar[int] = 0  # among sparse layers
    _handed: ClassVar[list[Any]]  # what was selected in this call of the model, shared by the layers
    _taken: ClassVar[int] = 0  # how much of it this layer has read

    def __post_init__(self):
        at_least("select", "reuse", every=(self.every, 1))
        object.__setattr__(self, "rule", make_rule("select", self.of))
        if isinstance(self.rule, Reuse):
            raise ValueError("[SparseConfig] 'select' 'reuse': option 'of' must be another rule.")
        if not all(number.isascii() and number.isdigit() for number in self._numbers):
            raise ValueError(
                f"[SparseConfig] 'select' 'reuse': option 'layers' must be layer numbers with + between "
                f"them, as 0+3+7, but got {self.layers!r}."
            )

    @property
    def _numbers(self) -> list[str]:
        return self.layers.split("+") if self.layers else []

    def check(self, config):
        if config.cache != "full":
            raise ValueError(
                f"[SparseConfig] select 'reuse' reads the same slots in several layers, which are the "
                f"same tokens only in cache 'full', but 'cache' is {config.cache!r}. Use cache='full', "
                f"or select={self.of!r}."
            )
        self.rule.check(config)

    # What the other rule says.

    wants_indexer = property(lambda self: self.rule.wants_indexer)
    keeps_entry = property(lambda self: self.rule.keeps_entry)
    fills = property(lambda self: self.rule.fills)
    by_position = property(lambda self: self.rule.by_position)
    reads = property(lambda self: self.rule.reads)
    by_head = property(lambda self: getattr(self.rule, "by_head", False))

    def bind(self, layer, indexer=None, backend="auto"):
        bound = super().bind(layer, indexer, backend)
        return bound._with(rule=self.rule.bind(layer, indexer, backend), _handed=[])

    def follow(self, before):
        place = 0 if before is None else before._place + 1
        selects = str(self.layer.index) in self._numbers if self.layers else place % self.every == 0
        object.__setattr__(self, "_place", place)
        object.__setattr__(self, "reuses", before is not None and not selects)
        if before is not None:
            object.__setattr__(self, "_handed", before._handed)

    def begin(self):
        object.__setattr__(self, "_taken", 0)
        if not self.reuses:
            self._handed.clear()

    def entry_width(self):
        return 0 if self.reuses else self.rule.entry_width()

    def entry(self, x, offset):
        return None if self.reuses else self.rule.entry(x, offset)

    def probe(self, x, offset, queries=None):
        # What reuses asks nothing, but counts its queries.
        return self.attention_queries(x, offset, queries) if self.reuses else self.rule.probe(x, offset, queries)

    def step(self, x, offset, queries=None):
        return super().step(x, offset, queries) if self.reuses else self.rule.step(x, offset, queries)

    def select(self, probe, cache, top_k, n_visible, end, forced):
        return self._either(self.rule.select, probe, cache, top_k, n_visible, end, forced)

    def select_tiles(self, probe, cache, top_k, tile_size, end, forced):
        return self._either(self.rule.select_tiles, probe, cache, top_k, tile_size, end, forced)

    def _either(self, select, probe, cache, top_k, rows, end, forced):
        asked = select.__name__, probe.queries.shape[2], top_k, end
        if not self.reuses:
            slots = select(probe, cache, top_k, rows, end, forced)
            self._handed.append((asked, slots))
            return slots
        there = self._handed[self._taken :]
        if not there or there[0][0] != asked:
            raise ValueError(
                f"[reuse] layer {self.layer.index} must read what a layer before it has selected in the "
                f"same call, but that was for {there[0][0] if there else 'nothing'}, and this is for "
                f"{asked}. Give every layer the same tokens, with caches of one make_prompt_cache(model)."
            )
        object.__setattr__(self, "_taken", self._taken + 1)
        return there[0][1]


def choose_layers(shares: Sequence[Sequence[float]], n: int) -> list[int]:
    """Choose which layers select, so that the others lose least.

    Args:
        shares (Sequence): ``shares[i][j]``: of what layer ``j`` would read by its own selection,
          the share that it has with that of layer ``i`` (``i <= j``).
        n (int): Layers that select, at least 1.

    Returns:
        list of int: Their places, ascending, the first 0: those for which the sum of the shares is
        largest when each other layer reuses the last before it.
    """
    n_layers = len(shares)
    if not 1 <= n <= n_layers:
        raise ValueError(f"[choose_layers] 'n' must be from 1 to {n_layers}, the number of layers, but got {n!r}.")
    # What a run of layers start..stop-1 has, when `start` selects and the others reuse.
    run = [[sum(shares[i][i:stop]) for stop in range(n_layers + 1)] for i in range(n_layers)]
    # best[stop]: the most that the layers before `stop` can have, and the layers that select for it.
    best: list[tuple[float, list[int]] | None] = [(0.0, [])] + [None] * n_layers
    for _ in range(n):
        following: list[tuple[float, list[int]] | None] = [None] * (n_layers + 1)
        for stop in range(1, n_layers + 1):
            for start in range(stop):
                before = best[start]
                if before is None:
                    continue
                total = before[0] + run[start][stop]
                there = following[stop]
                if there is None or total > there[0]:
                    following[stop] = total, [*before[1], start]
        best = following
    found = best[n_layers]
    assert found is not None  # there are layers enough for n runs
    return found[1]

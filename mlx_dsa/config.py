"""What sparse attention does: one frozen, validated record."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from .registry import make_rule

COLD_BITS = (4, 8, 16)


@dataclass(frozen=True)
class SparseConfig:
    """Describe how a patched model selects keys and what its cache keeps.

    Args:
        top_k (int): Keys that a query attends to, and entries that a budget
          cache keeps. Default: ``2048``.
        cache (str): ``"budget"`` evicts down to ``top_k`` entries a layer;
          ``"full"`` keeps every entry and gathers ``top_k`` of them a step;
          ``"tiered"`` keeps ``top_k`` at hand and the others in a cold store, from
          which a selection brings them back. Default: ``"budget"``.
        n_sink (int): First tokens, always selected and never evicted, counted
          inside ``top_k``. Default: ``4``.
        n_recent (int): Newest tokens, likewise. Default: ``64``.
        prefill (str): ``"dense"``, ``"exact"`` (one selection a query),
          ``"tile"`` (one selection a tile of queries), ``"stream"`` (cut to the budget
          while it is read; of ``"tiered"`` what is cut goes cold) or ``"auto"``: stream
          where a budget has positions ``"compact"``, evict ``"retention"`` and a retention
          head in every sparse layer; elsewhere tile where ``top_k`` has room for it, else
          exact. Default: ``"auto"``.
        tile_size (int): Queries that share one selection in ``"tile"``.
          Default: ``64``.
        stream_chunk (int): Tokens of a text between two cuts in ``"stream"``.
          Default: ``2048``.
        positions (str): ``"absolute"`` (a kept key stays where it stood in the text) or
          ``"compact"`` (what is kept is numbered anew whenever entries are dropped, so
          that no query sees a distance beyond what the cache holds); for a budget.
          Default: ``"absolute"``.
        dense_layers (tuple of int): Layers left as they are. Default: ``()``.
        observation_window (int): Last prompt queries whose scores decide what
          prefill leaves in the budget. Default: ``32``.
        select (str): The rule by which keys are selected, and behind a colon its options:
          ``"lightning"`` (trained indexers), or another of :mod:`mlx_dsa.rules`.
          Default: ``"lightning"``.
        evict (str): The rule that orders entries for eviction, or in a stream of ``"tiered"``
          for going cold, likewise: ``"retention"`` (the score of the retention head, decided
          when a token is read; ``"keydiff"`` where a layer has no head), ``"blend"`` (that
          score and KeyDiff's, each standardised,
          added; likewise), ``"keydiff"`` (keys most like the others go first),
          ``"index"`` (the scores of the last queries), ``"window"`` (oldest
          first), or another of :mod:`mlx_dsa.rules`. Default: ``"retention"``.
        cold_bits (int, optional): Bits of a cold entry's numbers in memory: 4, 8, or
          16 for entries as they are. Default: ``None`` (8).
        cold_file (str, optional): A new file that holds the cold entries, as they
          are, in place of memory. Default: ``None``.
        backend (str): Kernels: ``"auto"``, ``"reference"``, ``"metal"`` or
          ``"cuda"``. Default: ``"auto"``.

    Raises:
        ValueError: If a value is of the wrong type, out of range, or does not
          fit the others.
    """

    top_k: int = 2048
    cache: Literal["budget", "full", "tiered"] = "budget"
    n_sink: int = 4
    n_recent: int = 64
    prefill: Literal["auto", "dense", "exact", "tile", "stream"] = "auto"
    tile_size: int = 64
    stream_chunk: int = 2048
    positions: Literal["absolute", "compact"] = "absolute"
    dense_layers: tuple[int, ...] = ()
    observation_window: int = 32
    select: str = "lightning"
    evict: str = "retention"
    cold_bits: int | None = None
    cold_file: str | None = None
    backend: Literal["auto", "reference", "metal", "cuda"] = "auto"

    def __post_init__(self):
        for name, minimum in _MINIMUM.items():
            _check_int(name, getattr(self, name), minimum)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"[SparseConfig] '{name}' must be one of {', '.join(choices)} but got {getattr(self, name)!r}."
                )
        rules = [make_rule(kind, getattr(self, kind)) for kind in ("select", "evict")]
        object.__setattr__(self, "dense_layers", _layers(self.dense_layers))
        self._check_cold()
        protected = self.n_sink + self.n_recent
        if self.top_k < protected:
            raise ValueError(
                f"[SparseConfig] 'top_k' must be at least n_sink + n_recent = "
                f"{protected} but got {self.top_k}. Raise top_k, or lower n_recent."
            )
        if self.prefill == "stream" and self.cache == "full":
            raise ValueError(
                "[SparseConfig] prefill 'stream' cuts the cache while it reads, so it is for "
                "caches 'budget' and 'tiered', not for 'full'. Use cache='tiered', which "
                "loses nothing, or another prefill."
            )
        if self.cache == "tiered" and self.prefill == "stream":
            if make_rule("evict", self.evict).merges:
                raise ValueError(
                    f"[SparseConfig] evict {self.evict!r} changes values of what it keeps, which "
                    f"cache 'tiered' has cold as they were. Use cache='budget', or another rule."
                )
        if self.positions == "compact" and self.cache != "budget":
            raise ValueError(
                f"[SparseConfig] positions 'compact' number anew what a budget keeps, so they "
                f"are for cache 'budget' only, not for {self.cache!r}. Use cache='budget', or "
                f"positions='absolute'."
            )
        if self.cache == "tiered" and not rules[0].keeps_entry:
            raise ValueError(
                f"[SparseConfig] select {self.select!r} reads the keys themselves, which cache "
                f"'tiered' keeps cold. Use cache='full', or select='lightning'."
            )
        if self.evicts_by_head and (self.cache == "tiered" or self.prefill in ("exact", "tile")):
            raise ValueError(
                f"[SparseConfig] evict {self.evict!r} keeps entries by head, which is for cache "
                f"'budget' and prefill 'dense' or 'stream', not for {self.cache!r} and "
                f"{self.prefill!r}. Use those, or by_head=false."
            )
        if self.cache == "tiered" and not rules[0].fills:
            raise ValueError(
                f"[SparseConfig] select {self.select!r} selects now more keys, now fewer, and "
                f"cache 'tiered' keeps top_k at hand. Use cache='full', or select='lightning'."
            )
        if self.prefill == "tile" and not self.tile_fits:
            raise ValueError(
                f"[SparseConfig] 'top_k' must be at least tile_size + n_sink + "
                f"n_recent = {self.tile_size + protected} for prefill 'tile' but got "
                f"{self.top_k}. Use prefill='exact', or a smaller tile_size."
            )
        for rule in rules:
            rule.check(self)

    def _check_cold(self):
        for name in ("cold_bits", "cold_file"):
            if getattr(self, name) is not None and self.cache != "tiered":
                raise ValueError(
                    f"[SparseConfig] '{name}' is for cache 'tiered' only, not for "
                    f"{self.cache!r}. Leave it out, or use cache='tiered'."
                )
        if self.cold_bits not in (None, *COLD_BITS):
            raise ValueError(f"[SparseConfig] 'cold_bits' must be 4, 8 or 16 but got {self.cold_bits!r}.")
        if self.cold_bits is not None and self.cold_file is not None:
            raise ValueError(
                "[SparseConfig] 'cold_bits' has no meaning with cold_file, which holds "
                "entries as they are. Leave one of them out."
            )

    @property
    def wants_heads(self) -> bool:
        """Whether retention heads decide, alone or among others, what is dropped, or what a
        stream sends to a cold store."""
        evicts = self.cache == "budget" or self.prefill == "stream"
        return evicts and make_rule("evict", self.evict).wants_head

    @property
    def evicts_by_head(self) -> bool:
        """Whether each key head of a budget keeps entries of its own."""
        return self.cache != "full" and make_rule("evict", self.evict).by_head

    @property
    def wants_indexers(self) -> bool:
        """Whether a rule that is asked reads trained indexers."""
        return bool(self.reading_indexers)

    @property
    def reading_indexers(self) -> tuple[str, ...]:
        """The rules that are asked and read trained indexers."""
        asked = [("select", self.select)]
        if self.cache == "budget" or self.prefill == "stream":
            asked.append(("evict", self.evict))
        return tuple(text for kind, text in asked if make_rule(kind, text).wants_indexer)

    @property
    def auto_may_stream(self) -> bool:
        """Whether ``"auto"`` is ``"stream"`` once every sparse layer has a retention head."""
        return (self.prefill, self.cache, self.positions, self.evict) == (
            "auto", "budget", "compact", "retention"
        )  # fmt: skip

    def resolved(self, has_heads: bool) -> SparseConfig:
        """Return the config with ``"stream"`` in place of an ``"auto"`` that takes it.

        Args:
            has_heads (bool): Whether every sparse layer has a retention head.
        """
        streams = has_heads and self.auto_may_stream
        return replace(self, prefill="stream") if streams else self

    @property
    def tile_fits(self) -> bool:
        """Whether ``top_k`` has room for a tile's own keys and the forced ones."""
        return self.top_k >= self.tile_size + self.n_sink + self.n_recent

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseConfig:
        """Build a config from a mapping, such as a parsed JSON file.

        Args:
            values (Mapping): Field names to values.

        Returns:
            SparseConfig: The config.

        Raises:
            ValueError: If a key is not a field, or a value is not valid.
        """
        return from_mapping(cls, values)


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put settings over others.

    Where ``changes`` name ``top_k`` alone, the ``n_recent`` of ``values`` is at most half
    of it, and a warning says so where that changes something. Where they name a cache that
    keeps everything and no positions, these are absolute.

    Args:
        values (Mapping): Fields of :class:`SparseConfig` and others.
        changes (Mapping): What goes over them.

    Returns:
        dict: Both together.
    """
    merged = {**values, **changes}
    if changes.get("cache", "budget") != "budget" and "positions" not in changes:
        if values.get("positions") == "compact":  # of a budget that is not asked for
            merged["positions"] = SparseConfig.positions
    top_k, n_recent = changes.get("top_k"), values.get("n_recent")
    n_sink = merged.get("n_sink", SparseConfig.n_sink)
    if "n_recent" in changes or not (isinstance(top_k, int) and isinstance(n_recent, int) and isinstance(n_sink, int)):
        return merged
    # Where even the half has no room, what was given is refused as it is.
    if n_recent > top_k // 2 > 0 and n_sink + top_k // 2 <= top_k:
        merged["n_recent"] = top_k // 2
        warnings.warn(
            f"[SparseConfig] 'n_recent' is lowered from {n_recent} to {top_k // 2}, half of "
            f"top_k. Give n_recent to choose it.",
            stacklevel=3,
        )
    return merged


def from_mapping(cls: type, values: Mapping[str, Any]) -> Any:
    """Build a dataclass from a mapping, such as a parsed JSON file.

    Args:
        cls (type): The dataclass.
        values (Mapping): Field names to values.

    Returns:
        Any: An instance of ``cls``.

    Raises:
        ValueError: If a key is not a field, or the class refuses a value.
    """
    known = [f.name for f in fields(cls)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(
            f"[{cls.__name__}] unknown key {', '.join(map(repr, unknown))}: the keys are {', '.join(known)}."
        )
    return cls(**values)


_MINIMUM = {
    "top_k": 1,
    "n_sink": 0,
    "n_recent": 1,
    "tile_size": 1,
    "stream_chunk": 1,
    "observation_window": 1,
}
# What a setting may be, where it is one of some words.
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint)
    for name, hint in get_type_hints(SparseConfig).items()
    if get_args(hint) and all(isinstance(a, str) for a in get_args(hint))
}


def _check_int(name: str, value: Any, minimum: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"[SparseConfig] '{name}' must be a whole number of at least {minimum} but got {value!r}.")


def _layers(value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ValueError(f"[SparseConfig] 'dense_layers' must be a list of layer numbers but got {value!r}.")
    layers = tuple(value)
    for layer in layers:
        _check_int("dense_layers", layer, 0)
    return layers

"""What an evaluation compares: the dense model, sparse settings, baselines and controls.

A baseline is the same sparse attention by another rule of `mlx_dsa.rules`. A control is told the answer, so it
is no rule: another indexer stands in place of the trained one, and whether a token belongs to the needle is in the
token's index key, which the cache keeps, moves and drops with the entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..config import SparseConfig, override
from ..crossovers import resolve_auto
from ..families import Layer
from ..indexer import Indexer
from ..patch import SparsePatch, patch_sparse_generate
from ..presets import Preset
from ..rules import KVzip, make_rule, rule_names
from .each_rule import SELECT, Spec, each_rule

# Far above any index score, and small enough to leave scores their order.
_FORCE = 1e4


class MarkedIndexer:
    """Score marked tokens above all others, and those by their position."""

    has_retention = False

    def __init__(self, layer: int, marks: mx.array) -> None:
        self.marks = marks

    def bind(self, layer: Layer) -> MarkedIndexer:
        """Need nothing of the model."""
        return self

    def token_scores(self, batch: int, length: int, offset: int) -> mx.array:
        """Return what each token is worth `[batch, length]`, positive."""
        marks = _marks(self.marks, batch, length, offset)
        positions = mx.arange(offset, offset + length, dtype=mx.float32)
        return positions + 1 + marks * 2.0**20

    def project_keys(self, x: mx.array, offset: int = 0) -> mx.array:
        """Return index keys `[B, 1, L, 1]` that hold the token's worth."""
        return self.token_scores(x.shape[0], x.shape[1], offset)[:, None, :, None]

    def project_queries(self, x: mx.array, offset: int = 0) -> tuple[mx.array, mx.array]:
        """Return queries `[B, 1, L, 1]` and weights `[B, L, 1]` of one."""
        B, L, _ = x.shape
        return mx.ones((B, 1, L, 1)), mx.ones((B, L, 1))

    def project(self, x: mx.array, offset: int = 0) -> tuple[mx.array, mx.array, mx.array]:
        """Return index keys, queries and weights."""
        return self.project_keys(x, offset), *self.project_queries(x, offset)


class ForcedIndexer:
    """Score as a trained indexer does, but marked tokens above, or below, all others.

    Args:
        indexer (Indexer): the trained one.
        marks (mx.array): `[B, T]`, 1 where a token is marked.
        sign (int): 1 to keep the marked tokens, -1 to lose them.
    """

    has_retention = False

    def __init__(self, indexer: Indexer, marks: mx.array, sign: int) -> None:
        self.indexer, self.marks, self.sign = indexer, marks, sign

    def bind(self, layer: Layer) -> ForcedIndexer:
        """Bind the trained indexer."""
        return ForcedIndexer(self.indexer.bind(layer), self.marks, self.sign)

    def project_keys(self, x: mx.array, offset: int = 0) -> mx.array:
        """Return the index keys with the token's mark as one more dimension."""
        keys = self.indexer.project_keys(x, offset)
        marks = _marks(self.marks, x.shape[0], x.shape[1], offset)[:, None, :, None]
        return mx.concatenate([keys, marks.astype(keys.dtype)], axis=-1)

    def project_queries(self, x: mx.array, offset: int = 0) -> tuple[mx.array, mx.array]:
        """Return the queries with one more head, which reads the mark alone."""
        queries, weights = self.indexer.project_queries(x, offset)
        B, n_heads, L, head_dim = queries.shape
        blind = mx.concatenate([queries, mx.zeros((B, n_heads, L, 1), queries.dtype)], axis=-1)
        reader = mx.zeros((B, 1, L, head_dim + 1), queries.dtype)
        reader[..., -1] = 1
        force = mx.full((B, L, 1), self.sign * _FORCE, weights.dtype)
        return mx.concatenate([blind, reader], axis=1), mx.concatenate([weights, force], axis=-1)

    def project(self, x: mx.array, offset: int = 0) -> tuple[mx.array, mx.array, mx.array]:
        """Return index keys, queries and weights."""
        return self.project_keys(x, offset), *self.project_queries(x, offset)


def _marks(marks: mx.array, batch: int, length: int, offset: int) -> mx.array:
    """Return the marks of some tokens `[batch, length]`; what follows the marks is not marked."""
    if offset >= marks.shape[1]:
        return mx.zeros((batch, length))
    part = marks[:, offset : offset + length].astype(mx.float32)
    return mx.pad(part, [(0, 0), (0, length - part.shape[1])])


_INDEXERS = {
    "index": lambda indexer, layer, marks: indexer,
    "digits": lambda indexer, layer, marks: MarkedIndexer(layer, marks),
    "kept": lambda indexer, layer, marks: ForcedIndexer(indexer, marks, 1),
    "evicted": lambda indexer, layer, marks: ForcedIndexer(indexer, marks, -1),
    "kvzip": lambda indexer, layer, marks: indexer,
}

_KEEPS_ALL = {"positions": "absolute"}  # nothing is dropped, so nothing is numbered anew
# name -> (what scores the tokens, what the config must be). A policy not named here is an error.
_NAMED: dict[str, Any] = {
    "dense": None,
    "sparse": ("index", {}),
    "full": ("index", {"cache": "full", **_KEEPS_ALL}),
    "exact": ("index", {"cache": "full", "prefill": "exact", **_KEEPS_ALL}),
    "tile": ("index", {"cache": "full", "prefill": "tile", **_KEEPS_ALL}),
    "tiered": ("index", {"cache": "tiered", **_KEEPS_ALL}),
    "stream": ("index", {"cache": "budget", "prefill": "stream"}),
    "retention": ("index", {"evict": "retention"}),
    "blend": ("index", {"evict": "blend"}),
    "index": ("index", {"evict": "index"}),
    "keydiff": ("index", {"evict": "keydiff"}),
    "snapkv": ("index", {"evict": "snapkv", "prefill": "dense"}),
    # Its rule has no name among those of eviction: this one stands for it.
    "kvzip": ("kvzip", {"evict": "window", "prefill": "dense"}),
    "window": ("index", {"select": "window", "evict": "window"}),
    "random": ("index", {"select": "random", "evict": "random"}),
    # What stands in for the indexer must also be what orders eviction.
    "digits": ("digits", {"evict": "index"}),
    "kept": ("kept", {"evict": "index"}),
    "evicted": ("evicted", {"evict": "index"}),
}
NAMES = tuple(_NAMED)


@dataclass(frozen=True)
class Policy:
    """One of the things compared.

    Args:
        label (str): what it is called in results, such as "sparse@128".
        config (SparseConfig): its settings. Default: ``None``, the dense model.
        scorer (str): what stands in for the trained indexer: "index", nothing; "digits" (digits, the 20 tokens before
            each and the one after, an untrained rule), the controls "kept" and "evicted" (the needle's tokens above,
            or below, all others), or "kvzip" (nothing; a second reading orders eviction). Default: ``"index"``.
    """

    label: str
    config: SparseConfig | None = None
    scorer: str = "index"

    @property
    def top_k(self) -> int | None:
        """Keys that a query attends to, or ``None`` where it is all."""
        return self.config.top_k if self.config else None

    @property
    def streams(self) -> bool:
        """Whether texts are cut to the budget while they are read."""
        return self.config is not None and self.config.prefill == "stream"

    def resolved(self, indexers: Mapping[int, Any]) -> Policy:
        """Return the policy with the prefill that "auto" takes with these indexers.

        Args:
            indexers (Mapping): layer number to Indexer.
        """
        if self.config is None:
            return self
        # What stands in for an indexer orders eviction by "index", which "auto" never streams.
        return replace(self, config=resolve_auto(self.config, indexers))

    @property
    def wants_marks(self) -> str | None:
        """What the marks given to `apply` must mark: "needle", "digits" or nothing."""
        return {"kept": "needle", "evicted": "needle", "digits": "digits"}.get(self.scorer)

    @property
    def reads_again(self) -> bool:
        """Whether texts must be read a second time before they are cut: see `rules.kvzip`."""
        return self.scorer == "kvzip"

    @contextmanager
    def apply(
        self, subject: Preset, marks: mx.array | None = None, reads_again: bool = False
    ) -> Iterator[SparsePatch | None]:
        """Run a model under this policy until the context ends.

        Args:
            subject (Preset): the model with its indexers.
            marks (mx.array): `[B, T]`, 1 for the tokens that `wants_marks` names.
              Default: ``None``.
            reads_again (bool): whether the caller reads texts a second time where the policy wants it.
              Default: ``False``.

        Yields:
            SparsePatch: the patch, or ``None`` for the dense model.

        Raises:
            ValueError: if the policy wants a second reading and the caller makes none.
        """
        if self.reads_again and not reads_again:
            raise ValueError(
                f"[Policy] policy {self.label!r} reads a text twice before it is cut, which only evaluations "
                f"that ask about a text do. Use another policy."
            )
        if self.config is None:
            yield None
            return
        indexers = {layer: _INDEXERS[self.scorer](indexer, layer, marks) for layer, indexer in subject.indexers.items()}
        rule = KVzip() if self.reads_again else None
        with patch_sparse_generate(subject.model, indexers, evict_rule=rule, **vars(self.config)) as patch:
            yield patch


DENSE = Policy("dense")


def make_policy(spec: Spec, config: SparseConfig) -> Policy:
    """Return the policy that a name or a dict describes.

    Args:
        spec (str or dict): a name, or a dict with "policy" (the name), any fields of SparseConfig,
            and "label".
        config (SparseConfig): what the dict does not say.

    Raises:
        ValueError: if the name or a field is unknown, or they contradict each other.
    """
    fields = {"policy": spec} if isinstance(spec, str) else dict(spec)
    name, label = fields.pop("policy", "sparse"), fields.pop("label", None)
    named = lookup(name)
    if named is None:
        if fields:
            raise ValueError(f"[make_policy] policy 'dense' takes no {', '.join(fields)}.")
        return DENSE
    scorer, fixed = named
    for field, value in fixed.items():
        if fields.get(field, value) != value:
            raise ValueError(
                f"[make_policy] policy {name!r} is {field} {value!r} by itself but got "
                f"{fields[field]!r}. Leave {field} out, or use policy 'sparse'."
            )
    merged = SparseConfig.from_dict(override(vars(config), {**fixed, **fields}))
    orders = scorer in ("index", "kvzip") and "evict" in fixed and not {"cache", "select"} & set(fixed)
    if orders and merged.cache != "budget":
        raise ValueError(
            f"[make_policy] policy {name!r} is an order of eviction, but cache {merged.cache!r} "
            f"evicts nothing. Use policy {merged.cache!r}, or cache 'budget'."
        )
    return Policy(label or f"{_called(name, fields)}@{merged.top_k}", merged, scorer)


def lookup(name: str) -> tuple[str, dict[str, Any]] | None:
    """Return what scores the tokens of a policy and what its config must be; of "dense" ``None``.

    Raises:
        ValueError: if there is no such policy, or the rule that it names has no such option.
    """
    rule = name.removeprefix(SELECT) if isinstance(name, str) else ""
    if rule == name and name in _NAMED:
        return _NAMED[name]
    kind = "evict" if rule == name else "select"
    if rule.partition(":")[0] not in rule_names(kind):
        raise ValueError(f"[make_policy] 'policy' must be one of {', '.join(policy_names())} but got {name!r}.")
    make_rule(kind, rule)
    fixed = {} if kind == "evict" else _NAMED["exact"][1]
    return "index", {kind: rule, **fixed}


def policy_names() -> tuple[str, ...]:
    """Return the names of all policies: those of this file, and those that are rules' names."""
    forgetting = (name for name in rule_names("evict") if name not in _NAMED)
    return (*NAMES, *forgetting, *(SELECT + name for name in rule_names("select")))


def _called(name: str, fields: dict[str, Any]) -> str:
    """Return what a policy is called: "sparse" by the rules that its dict names."""
    if name != "sparse":
        return name
    selects = [SELECT + fields["select"]] if "select" in fields else []
    return ", ".join([fields.get("evict", name), *selects])


def make_policies(
    specs: Sequence[Spec], config: SparseConfig, top_k: Sequence[int | dict[str, Any]] = ()
) -> list[Policy]:
    """Return the policies of a run: the dense model once, every other for each top_k.

    Args:
        specs (list): as for `make_policy`, or `each_rule`.
        config (SparseConfig): the settings to start from.
        top_k (list): numbers, or dicts with "top_k" and what else goes with it, such as "n_recent".
            Default: ``()``, that of the config alone.
    """
    policies = []
    for spec in (one for given in specs for one in each_rule(given)):
        fixed = spec == "dense" or (isinstance(spec, dict) and "top_k" in spec)
        for k in ({},) if fixed or not top_k else top_k:
            changes = k if isinstance(k, dict) else {"top_k": k}
            base = SparseConfig.from_dict(override(vars(config), changes))
            policies.append(make_policy(spec, base))
    labels = [p.label for p in policies]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(f"[make_policies] two policies are called {twice[0]!r}. Give one a label.")
    return policies


def followed(name: str, field: str) -> bool:
    """Return whether a policy takes a setting from the config, not from its name or at all."""
    named = lookup(name)
    return named is not None and field not in named[1]


def pairings(policies: Sequence[Policy], compare: str | Sequence[str]) -> list[tuple[str, str]]:
    """Return which policies are compared with which, as labels in pairs.

    Args:
        policies (list of Policy): those of a run.
        compare (str or list of str): a label, with which all others are compared; or two names with
            a stroke between them, such as "tiered/full", whose policies of equal top_k are compared.
    """
    labels = [p.label for p in policies]
    pairs = []
    for wanted in [compare] if isinstance(compare, str) else compare:
        first, _, second = wanted.rpartition("/")
        for label in labels:
            name, at, top_k = label.partition("@")
            against = second + at + top_k if first else second
            if against in labels and against != label and first in ("", name):
                pairs.append((label, against))
    return pairs

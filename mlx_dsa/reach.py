"""Whether a model has positions for a text, where what is kept of it may be numbered anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.nn as nn

from .cache import SparseKVCache
from .config import SparseConfig
from .crossovers import resolve_auto
from .eviction import steps_planned
from .families import family_of, positions_of
from .patch import patch_of
from .positions import check_positions

_HINT = "; prefill 'stream' with positions 'compact' reads longer texts"


class Reach(NamedTuple):
    """Which positions a text takes.

    Args:
        limit (int, optional): The model's positions; ``None`` for no limit.
        config (SparseConfig, optional): How it is sparse; ``None`` for a dense model.
        keeps_all (bool): Whether a layer with attention keeps every entry where it stood.
          Default: ``False``.
    """

    limit: int | None
    config: SparseConfig | None = None
    keeps_all: bool = False

    @property
    def is_compact(self) -> bool:
        """Whether every layer with attention numbers anew what it keeps."""
        return bool(self.config and self.config.positions == "compact" and not self.keeps_all)

    @property
    def is_bounded(self) -> bool:
        """Whether a text of any length is read in as many positions."""
        return self.config is not None and self.is_compact and self.config.prefill == "stream"

    def most(self, n_tokens: int, n_written: int) -> int:
        """Return how many positions a conversation takes at most.

        Args:
            n_tokens (int): Its tokens, the answers among them.
            n_written (int): Those of an answer at most.
        """
        if self.config is None or not self.is_bounded:
            return n_tokens
        steps = steps_planned(self.config) or n_written
        return min(n_tokens, self.config.top_k + steps + self.config.stream_chunk)

    def check(self, where: str, n_positions: int, lower: str = "") -> None:
        """Refuse a text for which the model has no positions.

        Args:
            where (str): Who asks, for the message.
            n_positions (int): What the text takes.
            lower (str): What makes it shorter, as a sentence. Default: ``""``, the text.

        Raises:
            ValueError: If it is more than the model has.
        """
        if self.config is None or not self.is_bounded:
            lower = lower or "Use a shorter text, or a model with more positions"
            hint = _HINT if self.config and not self.keeps_all else ""
            check_positions(where, self.limit, n_positions, f"{lower}{hint}.")
        elif self.limit is not None and n_positions > self.limit:
            raise ValueError(
                f"[{where}] top_k {self.config.top_k:,} and stream_chunk "
                f"{self.config.stream_chunk:,} take {n_positions:,} positions but the model has "
                f"{self.limit:,}: it would answer wrongly. Lower top_k or stream_chunk."
            )

    def check_prompt(self, caches: Sequence[Any], n_tokens: int) -> None:
        """Refuse a prompt that can't be read and answered.

        Args:
            caches (Sequence): One cache a layer, of what was read and written before.
            n_tokens (int): Tokens of the prompt.

        Raises:
            ValueError: If the model has no positions for it and an answer that begins.
        """
        number, offset = self._at(caches)
        most = number + n_tokens + 1
        if self.config is not None and self.is_bounded:
            # From the first cut on, the number of a token begins from what was kept.
            chunk = self.config.stream_chunk
            to_a_cut = number + chunk - offset % chunk
            most = min(most, max(to_a_cut, self.config.top_k + chunk))
        self.check("prompt", most)

    def room(self, caches: Sequence[Any], n_tokens: int, wanted: int) -> int:
        """Return how many tokens the answer to a prompt may have.

        Args:
            caches (Sequence): One cache a layer, as before the prompt.
            n_tokens (int): Tokens of the prompt.
            wanted (int): Tokens that it may have where there are positions.
        """
        if self.limit is None:
            return wanted
        start = self._at(caches)[0] + n_tokens
        if self.config is not None and self.is_compact:
            start = min(start, self.config.top_k)  # what the prompt's end leaves
            steps = steps_planned(self.config)
            if steps and self.config.top_k + steps <= self.limit:
                return wanted
        return min(wanted, self.limit - start)

    def _at(self, caches) -> tuple[int, int]:
        """Return the number and the position of the next token."""
        seen = max((c.offset for c in caches if hasattr(c, "offset")), default=0)
        ours = [c.number for c in caches if isinstance(c, SparseKVCache)]
        return (max(ours) if self.is_compact and ours else seen), seen


def reach_of(model: nn.Module) -> Reach:
    """Return which positions texts of a model take, patched or not.

    Args:
        model (nn.Module): From mlx-lm.
    """
    limit, patch = positions_of(model), patch_of(model)
    if patch is None:
        return Reach(limit)
    return Reach(limit, patch.config, patch.keeps_all)


def reach_with(model: nn.Module, indexers: Mapping[int, Any], config: SparseConfig | None) -> Reach:
    """Return which positions texts of a model take once it is patched.

    Args:
        model (nn.Module): From mlx-lm, of a known family.
        indexers (Mapping): Layer number to :class:`Indexer`.
        config (SparseConfig, optional): How it will be patched; ``None`` if it will not.
    """
    limit = positions_of(model)
    if config is None:
        return Reach(limit)
    layers = family_of(model).layers(model)
    keeps_all = not set(layers) <= set(indexers) - set(config.dense_layers)
    return Reach(limit, resolve_auto(config, indexers), keeps_all)

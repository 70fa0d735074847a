"""How retention heads are trained, and how good they are: plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .config import RunConfig


@dataclass(frozen=True)
class RetentionConfig(RunConfig):
    """Describe the training of retention heads.

    A head learns, for each key, the largest attention that a later query pays to
    it. Which queries count depends on the text: of a conversation
    those of the replies and of the question before each; of running text all;
    of a text that is read twice those of the second reading.

    Args:
        steps, sequence_length, ..., seed: As in :class:`RunConfig`.
        retention_dim (int): Width of a head's hidden layer. A head may have a
          fifth of its indexer's parameters. Default: ``32``.
        repeat_share (float): Share of the sequences that become their first half
          and the same half again: what the second reading looks at in the first
          is what a reader would need of it [1]. Default: ``0.5``.
        min_distance (int): Queries at most so many tokens after a key do not
          count for it: the newest tokens are always kept. Default: ``32``.

    Raises:
        ValueError: If a value is of the wrong type or out of range.

    [1] Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context
        Reconstruction, 2025.
    """

    retention_dim: int = 32
    repeat_share: float = 0.5
    min_distance: int = 32

    _WHOLE = {
        **RunConfig._WHOLE,
        "sequence_length": 16,
        "retention_dim": 1,
        "min_distance": 1,
    }
    _SHARES = ("repeat_share",)

    def __post_init__(self):
        super().__post_init__()
        if self.sequence_length <= self.shortest:
            raise ValueError(
                f"[RetentionConfig] 'sequence_length' must exceed 8 * min_distance = "
                f"{self.shortest} but got {self.sequence_length}. Use longer sequences."
            )

    @property
    def shortest(self) -> int:
        """What a sequence must exceed for enough queries to come after its keys."""
        return 8 * self.min_distance


class RetentionScore(NamedTuple):
    """Quality of one layer's retention head on the held-out sequences.

    Args:
        loss (float): What training minimises, in nats a key.
        agreement_16 (float): Rank agreement at 1/16: of the sixteenth of the
          keys that later queries attend to most, the share that the head also
          puts in its highest sixteenth.
        agreement_8 (float): The same at 1/8.
    """

    loss: float
    agreement_16: float
    agreement_8: float

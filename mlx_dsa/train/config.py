"""How indexers are trained, and what a run reports: plain frozen records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..config import from_mapping


@dataclass(frozen=True)
class RunConfig:
    """Describe what all training runs have in common.

    Args:
        steps (int): Optimizer steps. Default: ``1000``.
        sequence_length (int): Tokens of a training sequence. Default: ``8192``.
        batch_size (int): Sequences a step. Default: ``1``.
        learning_rate (float): Peak of AdamW's learning rate. Default: ``2e-3``.
        warmup_steps (int): Steps of linear warm-up; a cosine to zero follows.
          Default: ``50``.
        weight_decay (float): AdamW's weight decay. Default: ``0.0``.
        max_grad_norm (float): Gradients of a layer are clipped to this norm.
          Default: ``1.0``.
        held_out (int): Sequences kept for evaluation. Default: ``8``.
        eval_every (int): Steps between evaluations. Default: ``100``.
        checkpoint_every (int): Steps between checkpoints. Default: ``100``.
        chunk_size (int): Tokens a chunk of the model's forward pass.
          Default: ``512``.
        seed (int): Seed of all that is drawn: initial weights, data order, and what a
          step looks at. Default: ``0``.

    Raises:
        ValueError: If a value is of the wrong type or out of range.
    """

    steps: int = 1000
    sequence_length: int = 8192
    batch_size: int = 1
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    held_out: int = 8
    eval_every: int = 100
    checkpoint_every: int = 100
    chunk_size: int = 512
    seed: int = 0

    # Whole numbers with the least each may be, numbers from 0, those above 0, those up to 1.
    _WHOLE: ClassVar[Mapping[str, int]] = {
        "steps": 1,
        "sequence_length": 2,
        "batch_size": 1,
        "warmup_steps": 0,
        "held_out": 1,
        "eval_every": 1,
        "checkpoint_every": 1,
        "chunk_size": 1,
        "seed": 0,
    }
    _REAL: ClassVar[Sequence[str]] = ("learning_rate", "weight_decay", "max_grad_norm")
    _POSITIVE: ClassVar[Sequence[str]] = ("learning_rate", "max_grad_norm")
    _SHARES: ClassVar[Sequence[str]] = ()

    def __post_init__(self):
        for name, minimum in self._WHOLE.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                self._refuse(name, f"a whole number of at least {minimum}")
        if self.seed >= 2**32:
            self._refuse("seed", "below 2**32")
        for name in (*self._REAL, *self._SHARES):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf"):
                self._refuse(name, "a number of at least 0")
        for name in self._POSITIVE:
            if getattr(self, name) == 0:
                self._refuse(name, "above 0")
        for name in self._SHARES:
            if getattr(self, name) > 1:
                self._refuse(name, "at most 1")

    def _refuse(self, name: str, wanted: str):
        raise ValueError(f"[{type(self).__name__}] '{name}' must be {wanted} but got {getattr(self, name)!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build a config of this class from a mapping, such as a parsed JSON file.

        Args:
            values (Mapping): Field names to values.

        Returns:
            RunConfig: The config.

        Raises:
            ValueError: If a key is not a field, or a value is not valid.
        """
        return from_mapping(cls, values)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Describe a distillation run.

    The indexers learn from sampled query rows: in every step and sequence,
    ``query_rows`` queries are compared with the teacher over all keys that they
    see. So the memory a step takes grows with
    ``batch_size * query_rows * sequence_length``, never with the square of the
    length. That should be the longest context the indexers will serve, and must
    exceed ``top_k``.

    Args:
        steps, sequence_length, ..., seed: As in :class:`RunConfig`.
        top_k (int): Keys of the support loss and of recall@K and mass@K; rows
          that see no more keys than this are not trained on. Default: ``2048``.
        n_sink (int): First tokens that the runtime always selects: no score of
          theirs is ever asked for, so they are left out of the loss. At most
          the ``n_sink`` of the :class:`~mlx_dsa.SparseConfig` that will be run;
          with 0 here and in ``n_recent`` the loss covers all visible keys.
          Default: ``4``.
        n_recent (int): Newest tokens, likewise. Default: ``32``.
        index_n_heads (int): Heads of an indexer. Default: ``4``.
        index_head_dim (int): Width of an index head. Default: ``32``.
        index_rope_dim (int): Leading dims of a head that RoPE rotates.
          Default: ``16``.
        query_rows (int): Query rows a sequence and step. Default: ``512``.
        focus_share (float): Share of these rows drawn from the replies of a
          conversation and the question before them, where a sequence has any;
          the other rows are drawn evenly. Default: ``0.5``.
        support_weight (float): Weight of the support loss, the negative log of
          the probability that the indexer gives to the teacher's top-k.
          Default: ``0.0``.

    Raises:
        ValueError: If a value is of the wrong type or out of range.
    """

    top_k: int = 2048
    n_sink: int = 4
    n_recent: int = 32
    index_n_heads: int = 4
    index_head_dim: int = 32
    index_rope_dim: int = 16
    query_rows: int = 512
    focus_share: float = 0.5
    support_weight: float = 0.0

    _WHOLE = {
        **RunConfig._WHOLE,
        "top_k": 1,
        "n_sink": 0,
        "n_recent": 0,
        "index_n_heads": 1,
        "index_head_dim": 2,
        "index_rope_dim": 2,
        "query_rows": 1,
    }
    _REAL = (*RunConfig._REAL, "support_weight")
    _SHARES = ("focus_share",)

    def __post_init__(self):
        super().__post_init__()
        if self.top_k <= self.n_sink + self.n_recent:
            raise ValueError(
                f"[TrainConfig] 'top_k' must exceed n_sink + n_recent = "
                f"{self.n_sink + self.n_recent} but got {self.top_k}. Raise top_k, or "
                f"lower n_recent."
            )
        if self.sequence_length <= self.top_k:
            raise ValueError(
                f"[TrainConfig] 'sequence_length' must exceed top_k = {self.top_k} but "
                f"got {self.sequence_length}. Use longer sequences, or a smaller top_k."
            )


class LayerScore(NamedTuple):
    """Quality of one layer's indexer on the held-out sequences.

    Args:
        loss (float): What training minimises, in nats a query.
        recall (float): recall@K: share of the teacher's top-k that the
          indexer's selection holds (sinks and recent tokens, then its top-k).
        mass (float): mass@K: share of the teacher's attention that the
          indexer's selection holds.
        best_mass (float): The same for the teacher's own top-k: the ceiling.
    """

    loss: float
    recall: float
    mass: float
    best_mass: float


class TrainProgress(NamedTuple):
    """What the progress callback gets, once a step and once before the first.

    Args:
        step (int): Steps done, from 0 (or from the checkpoint's step).
        steps (int): Steps of the whole run.
        loss (float, optional): Mean of the layers' training losses of this
          step; ``None`` where no step was taken yet.
        learning_rate (float): That of this step.
        tokens (int): Tokens trained on so far.
        seconds (float): Time since this process began to train.
        held_out (dict, optional): Layer number to :class:`LayerScore`, where
          this step was evaluated; else ``None``.
    """

    step: int
    steps: int
    loss: float | None
    learning_rate: float
    tokens: int
    seconds: float
    held_out: dict[int, LayerScore] | None


class TrainResult(NamedTuple):
    """Where the indexers are, and how good each layer's best step was.

    Args:
        path (Path): The safetensors file.
        best_steps (dict): Layer number to the step its weights come from.
        scores (dict): Layer number to its :class:`LayerScore` at that step.
        left_out (str): How many rows of the data were not learnt from, why, and
          where they are, in one line; empty where all were. Default: ``""``.
    """

    path: Path
    best_steps: dict[int, int]
    scores: dict[int, LayerScore]
    left_out: str = ""

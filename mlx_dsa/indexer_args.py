"""The shape of an indexer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IndexerArgs:
    """Give the shape of an indexer.

    Args:
        dim (int): Width of the model's hidden state.
        index_n_heads (int): Query heads of the indexer.
        index_head_dim (int): Width of a head, and of the one shared key.
        index_rope_dim (int): Leading dims of a head that RoPE rotates (even).
        norm (bool): Queries and keys pass an RMSNorm in place of a bias.
          Default: ``False``.
        retention_dim (int): Width of the retention head's hidden layer; 0 for no
          head. Default: ``0``.
        unweighted (bool): It reads the hidden state without the weight of its norm,
          until :meth:`Indexer.bind`. Default: ``False``.
        rope_theta (float): RoPE base, until :meth:`Indexer.bind` takes the
          model's. Default: ``1e6``.
        rope_scaling (dict, optional): RoPE scaling, likewise. Default: ``None``.
        max_position_embeddings (int): Positions of the model, likewise.
          Default: ``40960``.

    Raises:
        ValueError: If a size is not a whole number above 0, or the RoPE dims
          are odd or more than a head has.
    """

    dim: int
    index_n_heads: int
    index_head_dim: int
    index_rope_dim: int
    norm: bool = False
    retention_dim: int = 0
    unweighted: bool = False
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    max_position_embeddings: int = 40960

    def __post_init__(self):
        for name in ("dim", "index_n_heads", "index_head_dim", "index_rope_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"[IndexerArgs] '{name}' must be a whole number above 0 but got {value!r}.")
        if isinstance(self.retention_dim, bool) or not (
            isinstance(self.retention_dim, int) and self.retention_dim >= 0
        ):
            raise ValueError(
                f"[IndexerArgs] 'retention_dim' must be a whole number of at least 0 but got {self.retention_dim!r}."
            )
        if self.index_rope_dim % 2 or self.index_rope_dim > self.index_head_dim:
            raise ValueError(
                f"[IndexerArgs] 'index_rope_dim' must be even and at most "
                f"index_head_dim = {self.index_head_dim} but got {self.index_rope_dim}."
            )

"""The lightning indexer of DeepSeek Sparse Attention, one a layer [1].

[1] DeepSeek-AI, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with
    DeepSeek Sparse Attention, 2025.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.rope_utils import initialize_rope

from .ops import index_scores

# The projections in the order in which they are fused: what is wanted together is adjacent.
_FUSED = ("retention", "wk", "wq", "weights_proj")
# Rows of which a fused projection takes a multiple: GPUs have slow products for others.
_FUSED_ROWS = 8


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
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    max_position_embeddings: int = 40960

    def __post_init__(self):
        for name in ("dim", "index_n_heads", "index_head_dim", "index_rope_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"[IndexerArgs] '{name}' must be a whole number above 0 but got "
                    f"{value!r}."
                )
        if isinstance(self.retention_dim, bool) or not (
            isinstance(self.retention_dim, int) and self.retention_dim >= 0
        ):
            raise ValueError(
                f"[IndexerArgs] 'retention_dim' must be a whole number of at least 0 but "
                f"got {self.retention_dim!r}."
            )
        if self.index_rope_dim % 2 or self.index_rope_dim > self.index_head_dim:
            raise ValueError(
                f"[IndexerArgs] 'index_rope_dim' must be even and at most "
                f"index_head_dim = {self.index_head_dim} but got {self.index_rope_dim}."
            )


class RetentionHead(nn.Module):
    """Say how much later queries will need a token's entry.

    The score is decided once, from the token's own state, before any question is
    known: the log-odds of the largest attention that a query well after it will
    pay to it. KVzap [2] learns such a score for KVzip's [3] target.

    Args:
        dim (int): Width of the model's hidden state.
        hidden_dim (int): Width of the hidden layer.

    [2] Jegou and Jeblick, KVzap: Fast, Adaptive, and Faithful KV Cache Pruning.
    [3] Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context
        Reconstruction, 2025.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """Score tokens.

        Args:
            x (mx.array): Normalised hidden states ``[B, L, dim]``.

        Returns:
            mx.array: Scores ``[B, L]`` in float32.
        """
        return self.finish(self.up(x))

    def finish(self, hidden: mx.array) -> mx.array:
        """Score tokens from what ``up`` makes of them ``[B, L, hidden_dim]``."""
        return self.down(nn.gelu_approx(hidden))[..., 0].astype(mx.float32)


class _Fused(NamedTuple):
    """Weights ``[rows, dim]`` and bias ``[rows]`` of projections that are one product.

    Args:
        weight (mx.array): Each projection's rows, from a multiple of 8 on.
        bias (mx.array): Likewise; zeros where there is none.
        rows (dict): Name of a projection to its first row and their number.
    """

    weight: mx.array
    bias: mx.array
    rows: dict[str, tuple[int, int]]

    def __call__(self, x: mx.array, names: tuple[str, ...]) -> list[mx.array]:
        first = self.rows[names[0]][0]
        last, n = self.rows[names[-1]]
        part = slice(first, last + n + -n % _FUSED_ROWS)
        product = mx.addmm(self.bias[part], x, self.weight[part].T)
        starts = [(self.rows[name][0] - first, self.rows[name][1]) for name in names]
        return [product[..., start : start + n] for start, n in starts]


class Indexer(nn.Module):
    """Score every key for every query of one attention layer [1].

    ``I[t, s] = (Hi * Di)^-1/2 * sum_h w[t, h] * relu(q[t, h] . k[s])``

    The input is the layer's normalised hidden state (what ``self_attn``
    receives). RoPE turns the first ``index_rope_dim`` dims of queries and keys
    in half-split pairs.

    Args:
        args (IndexerArgs): The shape.
    """

    def __init__(self, args: IndexerArgs):
        super().__init__()
        self.args = args
        n_heads, head_dim = args.index_n_heads, args.index_head_dim
        self.wq = nn.Linear(args.dim, n_heads * head_dim, bias=not args.norm)
        self.wk = nn.Linear(args.dim, head_dim, bias=not args.norm)
        self.weights_proj = nn.Linear(args.dim, n_heads, bias=False)
        if args.norm:
            self.q_norm = nn.RMSNorm(n_heads * head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        if args.retention_dim:
            self.retention = RetentionHead(args.dim, args.retention_dim)
        self.rope = initialize_rope(
            args.index_rope_dim,
            base=args.rope_theta,
            traditional=False,
            scaling_config=args.rope_scaling,
            max_position_embeddings=args.max_position_embeddings,
        )
        self._fused: _Fused | None = None

    @property
    def has_retention(self) -> bool:
        """Whether there is a retention head."""
        return self.args.retention_dim > 0

    def project_keys(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Compute the index keys of tokens, to be cached once.

        Args:
            x (mx.array): Hidden states ``[B, L, dim]``.
            offset (int or mx.array): Position of the first one. Default: ``0``.

        Returns:
            mx.array: Index keys ``[B, 1, L, Di]``, rotated.
        """
        return self._keys(*self._project(x, "wk"), offset)

    def project_entries(
        self, x: mx.array, offset: int | mx.array = 0
    ) -> tuple[mx.array, mx.array]:
        """Compute what is kept of tokens where there is a retention head.

        Args:
            x (mx.array): Hidden states ``[B, L, dim]``.
            offset (int or mx.array): Position of the first one. Default: ``0``.

        Returns:
            tuple: Index keys, as :meth:`project_keys` does, and the scores of the
            retention head ``[B, L]`` in float32.
        """
        hidden, keys = self._project(x, "retention", "wk")
        return self._keys(keys, offset), self.retention.finish(hidden)

    def project_queries(
        self, x: mx.array, offset: int | mx.array = 0
    ) -> tuple[mx.array, mx.array]:
        """Compute the index queries and the weight of each index head.

        Args:
            x (mx.array): Hidden states ``[B, L, dim]``.
            offset (int or mx.array): Position of the first one. Default: ``0``.

        Returns:
            tuple: Queries ``[B, Hi, L, Di]``, rotated, and head weights
            ``[B, L, Hi]`` with the scale ``(Hi * Di)^-1/2`` in them.
        """
        return self._queries(*self._project(x, "wq", "weights_proj"), offset)

    def project(
        self, x: mx.array, offset: int | mx.array = 0
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Compute what :meth:`project_keys` and :meth:`project_queries` do, at once.

        Args:
            x (mx.array): Hidden states ``[B, L, dim]``.
            offset (int or mx.array): Position of the first one. Default: ``0``.

        Returns:
            tuple: Index keys, queries and head weights.
        """
        keys, queries, weights = self._project(x, "wk", "wq", "weights_proj")
        return self._keys(keys, offset), *self._queries(queries, weights, offset)

    def _project(self, x, *names) -> list[mx.array]:
        if self._fused is None:
            return [self._projection(name)(x) for name in names]
        return self._fused(x, names)

    def _projection(self, name) -> nn.Linear:
        return self.retention.up if name == "retention" else self[name]

    def _keys(self, keys, offset) -> mx.array:
        if self.args.norm:
            keys = self.k_norm(keys)
        return self.rope(keys[:, None], offset=offset)

    def _queries(self, queries, weights, offset) -> tuple[mx.array, mx.array]:
        n_heads, head_dim = self.args.index_n_heads, self.args.index_head_dim
        if self.args.norm:
            queries = self.q_norm(queries)
        queries = queries.reshape(*queries.shape[:2], n_heads, head_dim)
        queries = self.rope(queries.transpose(0, 2, 1, 3), offset=offset)
        return queries, weights * (n_heads * head_dim) ** -0.5

    def scores(
        self, x: mx.array, index_keys: mx.array, offset: int | mx.array = 0
    ) -> mx.array:
        """Score cached keys for the queries of ``x``.

        Args:
            x (mx.array): Hidden states of the queries ``[B, L, dim]``.
            index_keys (mx.array): Index keys ``[B, 1, T, Di]``.
            offset (int or mx.array): Position of the first query.
              Default: ``0``.

        Returns:
            mx.array: Scores ``[B, L, T]`` in float32, unmasked.
        """
        return index_scores(*self.project_queries(x, offset), index_keys)

    def bind(
        self, model_args: Any, dtype: mx.Dtype, fused: bool = True
    ) -> Indexer:
        """Return a copy with a model's RoPE and dtype; this one keeps its values.

        Args:
            model_args: The ``args`` of an mlx-lm Qwen3 or Qwen3-MoE model.
            dtype (mx.Dtype): The dtype of the model's activations.
            fused (bool): Whether what is computed at once is one product, of the
              weights as they are now. Not for training. Default: ``True``.

        Returns:
            Indexer: The copy, sharing memory where the dtype is the same.

        Raises:
            ValueError: If the model's hidden state has another width.
        """
        if model_args.hidden_size != self.args.dim:
            raise ValueError(
                f"[Indexer] 'dim' must be the model's hidden_size = "
                f"{model_args.hidden_size} but got {self.args.dim}. These indexers were "
                f"made for another model."
            )
        # mlx-lm's qwen3_moe builds its RoPE without the scaling in its config.
        scaling = model_args.rope_scaling if model_args.model_type == "qwen3" else None
        bound = Indexer(
            replace(
                self.args,
                rope_theta=model_args.rope_theta,
                rope_scaling=_fit_scaling(scaling, self.args.index_rope_dim),
                max_position_embeddings=model_args.max_position_embeddings,
            )
        )
        bound.update(tree_map(lambda p: p.astype(dtype), self.parameters()))
        bound.eval()
        if fused:
            bound._fuse()
            if dtype == self.wk.weight.dtype:
                bound._lend(self)
        return bound

    def _fuse(self):
        weights, biases, rows, end = [], [], {}, 0
        for name in _FUSED if self.has_retention else _FUSED[1:]:
            layer = self._projection(name)
            n, dim = layer.weight.shape
            missing = -n % _FUSED_ROWS
            bias = layer.bias if "bias" in layer else mx.zeros(n, layer.weight.dtype)
            weights += [layer.weight, mx.zeros((missing, dim), layer.weight.dtype)]
            biases += [bias, mx.zeros(missing, bias.dtype)]
            rows[name] = end, n
            end += n + missing
        self._fused = _Fused(mx.concatenate(weights), mx.concatenate(biases), rows)
        self._lend(self)

    def _lend(self, other: Indexer):
        # One copy of the weights in memory: the layers look into it.
        for name, (start, n) in self._fused.rows.items():
            layer = other._projection(name)
            layer.weight = self._fused.weight[start : start + n]
            if "bias" in layer:
                layer.bias = self._fused.bias[start : start + n]


def _fit_scaling(scaling: dict | None, dims: int) -> dict | None:
    """Return a RoPE scaling for heads that rotate ``dims`` dims.

    A scaling may have a factor for each pair of dims of the model's heads; a pair of the
    indexer takes that of the model's pair that turns as fast.
    """
    if not scaling:
        return scaling
    fitted, n = dict(scaling), dims // 2
    for name in ("short_factor", "long_factor"):
        factors = fitted.get(name)
        if isinstance(factors, (list, tuple)):
            fitted[name] = [factors[i * len(factors) // n] for i in range(n)]
    return fitted

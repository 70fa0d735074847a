"""The lightning indexer of DeepSeek Sparse Attention, one a layer [1].

[1] DeepSeek-AI, DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with
    DeepSeek Sparse Attention, 2025.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.rope_utils import initialize_rope

from .families import Layer
from .indexer_args import IndexerArgs
from .ops import index_scores
from .positions import fit_scaling

# The projections in the order in which they are fused: what is wanted together is adjacent.
_FUSED = ("retention", "wk", "wq", "weights_proj")
# Rows of which a fused projection takes a multiple: GPUs have slow products for others.
_FUSED_ROWS = 8


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
        (keys,) = self._project(x, "wk")
        return self._keys(keys, offset)

    def project_entries(self, x: mx.array, offset: int | mx.array = 0) -> tuple[mx.array, mx.array]:
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

    def project_queries(self, x: mx.array, offset: int | mx.array = 0) -> tuple[mx.array, mx.array]:
        """Compute the index queries and the weight of each index head.

        Args:
            x (mx.array): Hidden states ``[B, L, dim]``.
            offset (int or mx.array): Position of the first one. Default: ``0``.

        Returns:
            tuple: Queries ``[B, Hi, L, Di]``, rotated, and head weights
            ``[B, L, Hi]`` with the scale ``(Hi * Di)^-1/2`` in them.
        """
        queries, weights = self._project(x, "wq", "weights_proj")
        return self._queries(queries, weights, offset)

    def project(self, x: mx.array, offset: int | mx.array = 0) -> tuple[mx.array, mx.array, mx.array]:
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

    def scores(self, x: mx.array, index_keys: mx.array, offset: int | mx.array = 0) -> mx.array:
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

    def bind(self, layer: Layer, dtype: mx.Dtype | None = None, fused: bool = True) -> Indexer:
        """Return a copy for a layer of a model; this one keeps its values.

        Args:
            layer (Layer): The layer.
            dtype (mx.Dtype, optional): Default: ``None``, that of the layer's
              activations.
            fused (bool): Whether what is computed at once is one product, of the
              weights as they are now. Not for training. Default: ``True``.

        Returns:
            Indexer: The copy, sharing memory where the values are the same. It reads
            the layer's hidden state as the attention does.

        Raises:
            ValueError: If the model's hidden state has another width.
        """
        if layer.hidden_size != self.args.dim:
            raise ValueError(
                f"[Indexer] 'dim' must be the model's hidden_size = "
                f"{layer.hidden_size} but got {self.args.dim}. These indexers were "
                f"made for another model."
            )
        dtype = layer.dtype if dtype is None else dtype
        theta, scaling, max_positions = layer.rope
        bound = Indexer(
            replace(
                self.args,
                rope_theta=theta,
                rope_scaling=fit_scaling(scaling, self.args.index_rope_dim),
                max_position_embeddings=max_positions,
                unweighted=False,
            )
        )
        bound.update(self.parameters())
        if self.args.unweighted:
            norm = layer.norm_weight.astype(mx.float32)
            bound._scale_inputs(mx.where(norm == 0, 0, 1 / norm))
        bound.update(tree_map(lambda p: p.astype(dtype), bound.parameters()))
        bound.eval()
        if fused:
            bound._fuse()
            if dtype == self.wk.weight.dtype and not self.args.unweighted:
                bound._lend(self)
        return bound

    def unweighted(self, layer: Layer) -> Indexer:
        """Return a copy that reads the hidden state without its norm's weight.

        A model may be scaled, channel by channel, between a norm's weight and the
        matrices after it (as AWQ does) without computing anything else. Such a copy
        fits every one of them.

        Args:
            layer (Layer): The layer that this one is bound to.
        """
        copy = Indexer(replace(self.args, unweighted=True))
        copy.update(self.parameters())
        copy._scale_inputs(layer.norm_weight.astype(mx.float32))
        copy.eval()
        return copy

    def _scale_inputs(self, by: mx.array):
        """Scale what each channel of the hidden state ``[dim]`` counts."""
        for name in _FUSED if self.has_retention else _FUSED[1:]:
            projection = self._projection(name)
            projection.weight = projection.weight.astype(mx.float32) * by

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
        assert self._fused is not None
        # One copy of the weights in memory: the layers look into it.
        for name, (start, n) in self._fused.rows.items():
            layer = other._projection(name)
            layer.weight = self._fused.weight[start : start + n]
            if "bias" in layer:
                layer.bias = self._fused.bias[start : start + n]

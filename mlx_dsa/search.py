"""Trained search projections, one pair of matrices a layer, and their file.

unixsysdev, Make Attention Sub-Quadratic Again: Learned Search Projections for Attention Candidate
Retrieval (ann-sparseattention), 2026.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .arrays import evaluate
from .checkpoint_file import KIND, PROJECTIONS, check_kind, find_file, write_checkpoint
from .families import Layer


@dataclass(frozen=True)
class ProjectionsArgs:
    """Give the shape of search projections.

    Args:
        dim (int): Width of the model's hidden state.
        index_head_dim (int): Width of a search vector. Default: ``128``.
        index_n_heads (int): Query vectors a token, always 1.
    """

    dim: int
    index_head_dim: int = 128
    index_n_heads: int = 1


class Projections(nn.Module):
    """Turn hidden states into queries and keys whose cosine says what to read.

    The input is the layer's normalised hidden state. There is no bias, no RoPE, and one
    vector a token: it takes the place of a layer's :class:`Indexer`.

    Args:
        args (ProjectionsArgs): The shape.
    """

    kind = PROJECTIONS
    has_retention = False

    def __init__(self, args: ProjectionsArgs):
        super().__init__()
        self.args = args
        self.wq = nn.Linear(args.dim, args.index_head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.index_head_dim, bias=False)

    def project_keys(self, x: mx.array) -> mx.array:
        """Compute the search keys of tokens, to be cached once.

        Args:
            x (mx.array): Hidden states ``[B, L, dim]``.

        Returns:
            mx.array: ``[B, 1, L, n]``, each of length 1, in the dtype of ``x``.
        """
        return _unit(self.wk(x)).astype(x.dtype)[:, None]

    def project_queries(self, x: mx.array) -> mx.array:
        """Compute the search queries of tokens ``[B, 1, L, n]``, likewise."""
        return _unit(self.wq(x)).astype(x.dtype)[:, None]

    def bind(self, layer: Layer, dtype: mx.Dtype | None = None) -> Projections:
        """Return a copy for a layer of a model; this one keeps its values.

        Args:
            layer (Layer): The layer.
            dtype (mx.Dtype, optional): Default: ``None``, that of the layer's activations.

        Raises:
            ValueError: If the model's hidden state has another width.
        """
        if layer.hidden_size != self.args.dim:
            raise ValueError(
                f"[Projections] 'dim' must be the model's hidden_size = {layer.hidden_size} but "
                f"got {self.args.dim}. These projections were made for another model."
            )
        bound = Projections(self.args)
        bound.update(self.parameters())
        bound.set_dtype(layer.dtype if dtype is None else dtype)
        bound.eval()
        return bound


def _unit(x: mx.array) -> mx.array:
    """Return vectors of length 1 in float32; a zero stays zero."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt(mx.maximum((x * x).sum(axis=-1, keepdims=True), 1e-24))


def load_projections(path: str | os.PathLike) -> dict[int, Projections]:
    """Load search projections from a file of :func:`save_projections`.

    Args:
        path (str or PathLike): The safetensors file, or a folder that holds one.

    Returns:
        dict: Layer number to :class:`Projections`. A layer that is not in the file is
        not in the result, and stays dense.

    Raises:
        ValueError: If the file is missing or damaged, or holds something else.
    """
    file = find_file(Path(path))
    check_kind(file, PROJECTIONS)
    layers: dict[int, dict[str, mx.array]] = {}
    tensors: Any = mx.load(str(file))  # of its forms, a dict
    for name, tensor in tensors.items():
        parts = re.fullmatch(r"layers\.(\d+)\.(wq\.weight|wk\.weight)", name)
        if parts is None or tensor.ndim != 2:
            raise ValueError(
                f"[load_projections] {file} holds {name!r} {list(tensor.shape)}, which is no matrix of projections."
            )
        layers.setdefault(int(parts[1]), {})[parts[2]] = tensor
    projections = {i: make_projections(pair, f"layer {i} of {file}") for i, pair in sorted(layers.items())}
    evaluate(*projections.values())
    return projections


def make_projections(pair: Mapping[str, mx.array], where: str) -> Projections:
    """Return the projections of a layer.

    Args:
        pair (Mapping): ``"wq.weight"`` and ``"wk.weight"``, each ``[n, dim]``.
        where (str): What they are, for an error.

    Raises:
        ValueError: If one is missing, or their shapes differ.
    """
    shapes = {name: tensor.shape for name, tensor in pair.items()}
    if len(shapes) != 2 or len(set(shapes.values())) != 1:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
        raise ValueError(
            f"[Projections] {where} must have a matrix for queries and one for keys, of one shape, but has {told}."
        )
    n, dim = pair["wq.weight"].shape
    made = Projections(ProjectionsArgs(dim, n))
    made.load_weights(list(pair.items()))
    made.eval()
    return made


def save_projections(
    path: str | os.PathLike,
    projections: Mapping[int, Projections],
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Save search projections and their ``run_config.json``, each whole or not at all.

    Args:
        path (str or PathLike): A ``.safetensors`` file, or a folder for
          ``indexers.safetensors``.
        projections (Mapping): Layer number to :class:`Projections`, all of one shape.
        metadata (Mapping, optional): What else ``run_config.json`` should hold.
          Default: ``None``.

    Returns:
        Path: The safetensors file.

    Raises:
        ValueError: If there are none, or their shapes differ.
    """
    shapes = {p.args for p in projections.values()}
    if len(shapes) != 1:
        raise ValueError(f"[save_projections] 'projections' must be of one shape but got {len(shapes)}.")
    args = shapes.pop()
    tensors = {
        f"layers.{layer}.{name}": value
        for layer, made in projections.items()
        for name, value in tree_flatten(made.parameters())
    }
    run_config = {
        KIND: PROJECTIONS,
        "proj_dim": args.index_head_dim,
        "hidden_size": args.dim,
        "layers": sorted(projections),
        **(metadata or {}),
    }
    return write_checkpoint(Path(path), tensors, {KIND: PROJECTIONS}, run_config)

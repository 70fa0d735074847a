"""Indexers on disk: one safetensors file and its run_config.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .arrays import evaluate
from .checkpoint_file import INDEXERS as INDEXERS  # for those who fetch
from .checkpoint_file import LIGHTNING, RUN_CONFIG, check_kind, find_file, read_header, write_checkpoint
from .indexer import Indexer, IndexerArgs

_ALIASES = {
    "wq": ("wq", "wq_b", "q_proj", "query_proj", "query", "q"),
    "wk": ("wk", "k_proj", "key_proj", "key", "k"),
    "weights_proj": ("weights_proj", "weight_proj", "head_weights", "w_proj", "gate"),
    "q_norm": ("q_norm", "query_norm"),
    "k_norm": ("k_norm", "key_norm"),
}
# Which hidden state indexers read: the norm's output, or that without the norm's weight.
# A file that does not say has the first.
_HIDDEN_STATE, _WEIGHTED, _UNWEIGHTED = "hidden_state", "weighted", "unweighted"
# Matrices stored in fewer bits, as MLX quantises; each with its scales and biases beside it.
_BITS, _GROUP_SIZE = "bits", 64
_QUANTISED = (".scales", ".biases")
_HEAD = "retention.up.weight"  # of a layer that has a retention head
_SIZES = {  # argument -> its key in run_config.json
    "dim": "hidden_size",
    "proj_dim": "proj_dim",
    "n_heads": "indexer_heads",
    "rope_dim": "rope_dim",
}


def load_indexers(
    path: str | os.PathLike,
    *,
    dim: int | None = None,
    proj_dim: int | None = None,
    n_heads: int | None = None,
    rope_dim: int | None = None,
) -> dict[int, Indexer]:
    """Load the indexers of a model from a safetensors file.

    Sizes that are not given come from ``run_config.json`` beside the file (keys
    ``hidden_size``, ``proj_dim``, ``indexer_heads``, ``rope_dim``, at the top
    level or under ``metadata``). Tensors are matched by the layer number in
    their name, then by name, then by shape.

    Args:
        path (str or PathLike): The file, or a folder that holds one.
        dim (int, optional): Width of the hidden state.
        proj_dim (int, optional): Width of an index head (or of all of them
          together, where the file's shapes say so).
        n_heads (int, optional): Index heads.
        rope_dim (int, optional): Leading dims of a head that RoPE rotates.

    Returns:
        dict: Layer number to :class:`Indexer`. A layer that is not in the file
        is not in the result, and stays dense.

    Raises:
        ValueError: If the file is missing, damaged, or holds other tensors than
          the sizes ask for.
    """
    file = find_file(Path(path))
    check_kind(file, LIGHTNING)
    given = {"dim": dim, "proj_dim": proj_dim, "n_heads": n_heads, "rope_dim": rope_dim}
    sizes = _complete_sizes(given, file.with_name(RUN_CONFIG))
    tensors, unweighted = _read_tensors(file)
    args = replace(_infer_args(sizes, tensors, file), unweighted=unweighted)

    layers: dict[int, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        number = re.search(r"\d+", name)
        if number is None:
            raise ValueError(f"[load_indexers] tensor {name!r} in {file} has no layer number.")
        layers.setdefault(int(number.group()), {})[name] = tensor
    indexers = {}
    for layer in sorted(layers):
        indexers[layer] = indexer = Indexer(args)
        indexer.load_weights(_match(layers[layer], indexer, layer, file))
        indexer.eval()
    evaluate(*indexers.values())
    return indexers


def has_heads(path: str | os.PathLike) -> bool:
    """Return whether the indexers of a file have retention heads; all have, or none.

    Only the file's header is read.

    Args:
        path (str or PathLike): As in :func:`load_indexers`.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    return any(name.endswith(_HEAD) for name in read_header(find_file(Path(path)))[1])


def save_indexers(
    path: str | os.PathLike,
    indexers: Mapping[int, Indexer],
    metadata: Mapping[str, Any] | None = None,
    *,
    bits: int | None = None,
) -> Path:
    """Save indexers and their ``run_config.json``, each file whole or not at all.

    Args:
        path (str or PathLike): A ``.safetensors`` file, or a folder for
          ``indexers.safetensors``.
        indexers (Mapping): Layer number to :class:`Indexer`, all of one shape.
        metadata (Mapping, optional): What else ``run_config.json`` should hold
          (JSON values). Default: ``None``.
        bits (int, optional): 8 stores matrices in 8 bits, half of the file, in groups
          of 64; :func:`load_indexers` makes float16 of them. Default: ``None``, as
          they are.

    Returns:
        Path: The safetensors file.

    Raises:
        ValueError: If there are no indexers, their shapes differ, or ``bits`` is
          neither ``None`` nor 8.
    """
    if bits not in (None, 8):
        raise ValueError(f"[save_indexers] 'bits' must be None or 8 but got {bits!r}.")
    shapes = {
        (a.dim, a.index_head_dim, a.index_n_heads, a.index_rope_dim) + (a.norm, a.retention_dim, a.unweighted)
        for a in (indexer.args for indexer in indexers.values())
    }
    if len(shapes) != 1:
        raise ValueError(f"[save_indexers] 'indexers' must be of one shape but got {len(shapes)}.")
    dim, proj_dim, n_heads, rope_dim, _, retention_dim, unweighted = shapes.pop()
    tensors = {
        f"layers.{layer}.{name}": value
        for layer, indexer in indexers.items()
        for name, value in tree_flatten(indexer.parameters())
    }
    run_config = {
        "proj_dim": proj_dim,
        "indexer_heads": n_heads,
        "rope_dim": rope_dim,
        "hidden_size": dim,
        "retention_dim": retention_dim,
        _HIDDEN_STATE: _UNWEIGHTED if unweighted else _WEIGHTED,
        "layers": sorted(indexers),
        **(metadata or {}),
    }
    form = {_HIDDEN_STATE: _UNWEIGHTED if unweighted else _WEIGHTED}
    if bits:
        form[_BITS] = str(bits)
        tensors = _quantise(tensors, bits)
    return write_checkpoint(Path(path), tensors, form, run_config)


def _complete_sizes(given: dict[str, int | None], run_config: Path) -> dict[str, int]:
    stored: dict[str, Any] = {}
    if run_config.is_file():
        try:
            top = json.loads(run_config.read_text(encoding="utf-8"))
            stored = {**top.get("metadata", {}), **top}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"[load_indexers] {run_config} is not a JSON object: {error}") from None
    sizes: dict[str, Any] = {
        name: stored.get(_SIZES[name]) if value is None else value for name, value in given.items()
    }
    missing = [name for name, value in sizes.items() if value is None]
    if missing:
        raise ValueError(
            f"[load_indexers] '{missing[0]}' is neither given nor in {run_config} (as {_SIZES[missing[0]]!r})."
        )
    return sizes


def _read_tensors(file: Path) -> tuple[dict[str, mx.array], bool]:
    """Return the tensors, and whether they read the unweighted hidden state."""
    # mx.load reads lazily and would find a short file only in use.
    metadata, _ = read_header(file)
    form, bits = metadata.get(_HIDDEN_STATE, _WEIGHTED), metadata.get(_BITS)
    if form not in (_WEIGHTED, _UNWEIGHTED) or bits not in (None, "8"):
        told = f"a hidden state {form!r}" if bits in (None, "8") else f"matrices of {bits!r} bits"
        raise ValueError(f"[load_indexers] {file} has {told} that this version does not know. Upgrade mlx-dsa.")
    tensors: Any = mx.load(str(file))  # of its forms, a dict
    if not tensors:
        raise ValueError(f"[load_indexers] {file} holds no tensors.")
    return _dequantise(tensors, int(bits)) if bits else tensors, form == _UNWEIGHTED


def _quantise(tensors: Mapping[str, mx.array], bits: int) -> dict[str, mx.array]:
    """Store matrices whose rows are whole groups in fewer bits; the rest as float16."""
    stored = {}
    for name, value in tensors.items():
        value = value.astype(mx.float16)
        if value.ndim == 2 and value.shape[1] % _GROUP_SIZE == 0:
            parts = mx.quantize(value, group_size=_GROUP_SIZE, bits=bits)
            stored.update({name + end: part for end, part in zip(("", *_QUANTISED), parts)})
        else:
            stored[name] = value
    return stored


def _dequantise(stored: Mapping[str, mx.array], bits: int) -> dict[str, mx.array]:
    tensors = {}
    for name, value in stored.items():
        if all(name + end in stored for end in _QUANTISED):
            scales, biases = (stored[name + end] for end in _QUANTISED)
            value = mx.dequantize(value, scales, biases, group_size=_GROUP_SIZE, bits=bits)
        if not name.endswith(_QUANTISED):
            tensors[name] = value
    return tensors


def _infer_args(sizes: dict, tensors: dict[str, mx.array], file: Path) -> IndexerArgs:
    dim, head_dim, n_heads = sizes["dim"], sizes["proj_dim"], sizes["n_heads"]
    shapes = {t.shape for t in tensors.values()}
    each_head = (head_dim * n_heads, dim) in shapes
    if not each_head and head_dim % n_heads == 0 and (head_dim, dim) in shapes:
        head_dim //= n_heads
    return IndexerArgs(
        dim=dim,
        index_n_heads=n_heads,
        index_head_dim=head_dim,
        index_rope_dim=sizes["rope_dim"],
        norm=any("norm" in name for name in tensors),
        retention_dim=next((t.shape[0] for n, t in tensors.items() if n.endswith(_HEAD)), 0),
    )


def _match(found: dict[str, mx.array], indexer: Indexer, layer: int, file: Path) -> list[tuple[str, mx.array]]:
    wanted = {name: p.shape for name, p in tree_flatten(indexer.parameters())}
    matched: dict[str, mx.array] = {}
    unnamed = []
    for name, tensor in found.items():
        key = _canonical(name)
        if key is not None and key in wanted and key not in matched and wanted[key] == tensor.shape:
            matched[key] = tensor
        else:
            unnamed.append((name, tensor))
    for name, tensor in unnamed:
        fits = [k for k, shape in wanted.items() if shape == tensor.shape and k not in matched]
        if len(fits) == 1 and _canonical(name) not in wanted:
            matched[fits[0]] = tensor
    if len(matched) != len(wanted) or len(matched) != len(found):
        raise ValueError(
            f"[load_indexers] layer {layer} of {file} does not fit: found "
            f"{_listing({n: t.shape for n, t in found.items()})}; wanted "
            f"{_listing(wanted)}."
        )
    return list(matched.items())


def _canonical(name: str) -> str | None:
    head = re.search(r"retention\.(up|down)\.(weight|bias)$", name)
    if head:
        return head.group()
    parts = name.split(".")
    kind = parts.pop() if parts[-1] in ("weight", "bias") else "weight"
    for role, aliases in _ALIASES.items():
        if parts and parts[-1] in aliases:
            return f"{role}.{kind}"
    return None


def _listing(shapes: Mapping[str, tuple]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())

"""Trained search projections from files of other systems."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..search import Projections, make_projections
from .gguf_file import GGUFFile
from .torch_file import TorchFile

__all__ = ["read_projections"]

# How each system names the matrices: layer, then which.
_TORCH = re.compile(r"(?:^|\.)projections\.(\d+)\.W_([QK])s\.(.+)")
_GGUF = re.compile(r"blk\.(\d+)\.indexer\.(proj|attn_k)\.weight")
_GGUF_LIGHTNING = ".indexer.attn_q_b.weight"
_ROLES = {"Q": "wq.weight", "K": "wk.weight", "proj": "wq.weight", "attn_k": "wk.weight"}


def read_projections(path: str | os.PathLike, transposed: bool | None = None) -> dict[int, Projections]:
    """Read search projections of a PyTorch checkpoint, or of a GGUF file.

    Nothing in the file is executed. PyTorch: the zip format of ``torch.save``, with tensors
    ``projections.<layer>.W_Qs.weight`` and ``W_Ks.weight`` at any depth. GGUF: tensors
    ``blk.<layer>.indexer.proj.weight`` (queries) and ``blk.<layer>.indexer.attn_k.weight``
    (keys), in F32, F16, BF16 or Q8_0; what else the file holds is not read.

    Args:
        path (str or PathLike): The file, told by its beginning.
        transposed (bool, optional): Whether matrices are stored ``[dim, n]`` and not
          ``[n, dim]``. Default: ``None``: they are not, or an error asks.

    Returns:
        dict: Layer number to :class:`Projections`.

    Raises:
        ValueError: If it is neither, is damaged, holds other things than tensors and plain
          values, has no projections, or does not show which way round they are.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"[read_projections] there is no file {path}.")
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        found, dim = _of_gguf(path)
    elif start == b"PK\x03\x04":
        found, dim = _of_torch(path), None
    else:
        raise ValueError(
            f"[read_projections] {path} is neither a GGUF file nor a PyTorch checkpoint in zip "
            f"format. Save an older checkpoint again with torch.save."
        )
    if not found:
        raise ValueError(
            f"[read_projections] {path} holds no search projections: no tensor is named "
            f"projections.<layer>.W_Qs.weight or blk.<layer>.indexer.proj.weight."
        )
    turn = _turns(path, found, dim, transposed)
    made = {}
    for layer, pair in sorted(found.items()):
        pair = {role: mx.contiguous(x.T) if turn else x for role, x in pair.items()}
        made[layer] = make_projections(pair, f"layer {layer} of {path}")
    if len({projections.args for projections in made.values()}) != 1:
        raise ValueError(f"[read_projections] the layers of {path} differ in shape.")
    return made


def _of_torch(path: Path) -> dict[int, dict[str, mx.array]]:
    file = TorchFile(path)
    found: dict[int, dict[str, mx.array]] = {}
    for name, tensor in file.tensors.items():
        parts = _TORCH.search(name)
        if parts is None:
            continue
        layer, role, rest = parts.groups()
        if rest != "weight":
            raise ValueError(
                f"[read_projections] {path} holds {name!r}: its projections are not one matrix "
                f"each without a bias, which is all that is known here."
            )
        pair = found.setdefault(int(layer), {})
        if _ROLES[role] in pair:
            raise ValueError(f"[read_projections] {path} holds {parts.group()!r} twice.")
        pair[_ROLES[role]] = _matrix(path, name, file.read(tensor))
    return found


def _of_gguf(path: Path) -> tuple[dict[int, dict[str, mx.array]], int | None]:
    file = GGUFFile(path)
    if any(name.endswith(_GGUF_LIGHTNING) for name in file.tensors):
        raise ValueError(
            f"[read_projections] {path} holds the lightning indexers of a model that was trained "
            f"with them, not search projections."
        )
    found: dict[int, dict[str, mx.array]] = {}
    for name in file.tensors:
        parts = _GGUF.fullmatch(name)
        if parts is not None:
            pair = found.setdefault(int(parts[1]), {})
            pair[_ROLES[parts[2]]] = _matrix(path, name, file.read(name))
    dim = file.metadata.get(f"{file.metadata.get('general.architecture')}.embedding_length")
    return found, dim if type(dim) is int else None


def _matrix(path: Path, name: str, tensor: mx.array) -> mx.array:
    if tensor.ndim != 2 or not tensor.size:
        raise ValueError(f"[read_projections] {name!r} in {path} must be a matrix but is {list(tensor.shape)}.")
    if not mx.isfinite(tensor).all():
        raise ValueError(f"[read_projections] {name!r} in {path} holds numbers that are not finite.")
    return tensor


def _turns(
    path: Path,
    found: Mapping[int, Mapping[str, mx.array]],
    dim: int | None,
    transposed: bool | None,
) -> bool:
    """Say whether matrices must be turned to be ``[n, dim]``."""
    shape = next(iter(next(iter(found.values())).values())).shape
    # A search vector is shorter than the hidden state, whose width PyTorch does not tell.
    rows, columns = (n == (dim or max(shape)) for n in shape)
    stored = f"{path} stores its projections as {list(shape)}"
    of = f"for a hidden state of width {dim}" if dim else "as [search width, hidden width]"
    if not rows and not columns:
        raise ValueError(f"[read_projections] {stored}, which doesn't fit {of}.")
    if transposed is None and rows:
        how = "fits both ways round" if columns else "is the wrong way round"
        raise ValueError(
            f"[read_projections] {stored}, which {how} {of}. Say which it is: give 'transposed', or that it is not."
        )
    if transposed and not rows:
        raise ValueError(f"[read_projections] {stored}, which is not transposed {of}. Leave 'transposed' out.")
    if transposed is False and not columns:
        raise ValueError(f"[read_projections] {stored}, which is transposed {of}: give 'transposed'.")
    return bool(transposed)

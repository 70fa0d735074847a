"""What was found offline of a model's heads, for rules that read it, and its file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .checkpoint_file import CALIBRATED, KIND, check_kind, find_file, read_header, write_checkpoint
from .families import Layer

_MODEL, _DIGITS = "model", "digits"  # in a file's header: whose it is, by name and by layer


class Calibration(nn.Module):
    """Hold what was found of one layer. It takes the place of a layer's :class:`Indexer`.

    Args:
        kind (str): The rule of selecting that reads it.
        found (Mapping): Names to arrays, the first axis of each the layer's key heads.
        model (str): What its model was called.
        digits (str): Of :func:`digits_of` for its layer.
    """

    has_retention = False

    def __init__(self, kind: str, found: Mapping[str, mx.array], model: str, digits: str):
        super().__init__()
        self.kind, self.model, self.digits = kind, model, digits
        # As constants: the sums by which a fingerprint knows weights don't tell orders of channels apart.
        for name, array in found.items():
            setattr(self, f"_{name}", array)

    @property
    def found(self) -> dict[str, mx.array]:
        """What was found, by name."""
        return {name[1:]: a for name, a in self.items() if isinstance(a, mx.array)}

    def bind(self, layer: Layer) -> Calibration:
        """Return it for a layer of a model.

        Args:
            layer (Layer): The layer.

        Raises:
            ValueError: If it was made for another model, or another layer.
        """
        if digits_of(layer) != self.digits:
            raise ValueError(
                f"[patch_sparse_generate] the calibration given is of {self.model}, and this is another "
                f"model: layer {layer.index} has other weights. Make one: mlx-dsa calibrate --rule {self.kind}."
            )
        return self


def digits_of(layer: Layer) -> str:
    """Identify a layer by the shape of its heads and the weights of its norm and keys.

    Args:
        layer (Layer): Of a model.

    Returns:
        str: 16 hexadecimal digits, the same on every device, and for a model that was
        loaded in a wider dtype.
    """
    shape = [layer.index, layer.n_heads, layer.n_kv_heads, layer.head_dim]
    digest = hashlib.sha256(json.dumps(shape).encode())
    weights = {"norm": layer.norm_weight, **dict(tree_flatten(layer.module.k_proj.parameters()))}
    for name, weight in sorted(weights.items()):
        bits = weight.astype(mx.float32).view(mx.uint32) if mx.issubdtype(weight.dtype, mx.floating) else weight
        bits = bits.astype(mx.uint32).reshape(-1, weight.shape[-1])
        digest.update(f"{name} {weight.shape}".encode())
        for axis in (0, 1):  # whole numbers have one sum in any order
            digest.update(np.array(bits.sum(axis=axis)).tobytes())
    return digest.hexdigest()[:16]


def save_calibration(
    path: str | os.PathLike,
    calibrations: Mapping[int, Calibration],
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Save what was found of a model's layers and its ``run_config.json``, each whole or not at all.

    Args:
        path (str or PathLike): A ``.safetensors`` file, or a folder for
          ``indexers.safetensors``.
        calibrations (Mapping): Layer number to :class:`Calibration`, all of one model and kind.
        metadata (Mapping, optional): What else ``run_config.json`` should hold.
          Default: ``None``.

    Returns:
        Path: The safetensors file.

    Raises:
        ValueError: If there are none, or they are of several models or kinds.
    """
    of = {(c.kind, c.model) for c in calibrations.values()}
    if len(of) != 1:
        raise ValueError(f"[save_calibration] 'calibrations' must be of one model and kind but got {len(of)}.")
    kind, model = of.pop()
    tensors = {f"layers.{i}.{name}": a for i, c in calibrations.items() for name, a in c.found.items()}
    digits = {str(i): c.digits for i, c in sorted(calibrations.items())}
    header = {KIND: kind, _MODEL: model, _DIGITS: json.dumps(digits)}
    run_config = {KIND: kind, _MODEL: model, "layers": sorted(calibrations), **(metadata or {})}
    return write_checkpoint(Path(path), tensors, header, run_config)


def load_calibration(path: str | os.PathLike, kind: str) -> dict[int, Calibration]:
    """Load what :func:`save_calibration` wrote.

    Args:
        path (str or PathLike): The safetensors file, or a folder that holds one.
        kind (str): The rule of selecting that is to read it.

    Returns:
        dict: Layer number to :class:`Calibration`. A layer that is not in the file stays
        dense.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    if kind not in CALIBRATED:
        raise ValueError(f"[load_calibration] 'kind' must be one of {', '.join(CALIBRATED)} but got {kind!r}.")
    file = find_file(Path(path))
    check_kind(file, kind)
    header, _ = read_header(file)
    try:
        model, digits = header[_MODEL], json.loads(header[_DIGITS])
        tensors: Any = mx.load(str(file))  # of its forms, a dict
        layers: dict[str, dict[str, mx.array]] = {i: {} for i in digits}
        for name, tensor in tensors.items():
            _, number, part = name.split(".")
            layers[number][part] = tensor
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"[load_calibration] {file} is not a whole calibration ({error}). Make it again.") from None
    made = {int(i): Calibration(kind, found, model, digits[i]) for i, found in layers.items()}
    mx.eval([calibration.found for calibration in made.values()])
    return made

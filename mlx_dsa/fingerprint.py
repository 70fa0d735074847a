"""What decides the keys and values that a model makes of a text, as a few digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Fingerprint(NamedTuple):
    """Identify modules: 64 hexadecimal digits each.

    Args:
        form (str): Their names, kinds, settings and constants (RoPE, heads, norms, bits),
          and the shapes and dtypes of their weights.
        weights (str): Every bit of their weights. It is meant to tell models apart, not
          to withstand an attack.
    """

    form: str
    weights: str


def fingerprint(modules: Mapping[str, nn.Module]) -> Fingerprint:
    """Identify modules by all that they compute with.

    Args:
        modules (Mapping): Names to modules, each without its children's arrays, as
          ``named_modules()`` gives them.

    Returns:
        Fingerprint: The same on every device.
    """
    form, weights = hashlib.sha256(), hashlib.sha256()
    sums: list[mx.array] = []
    for name, module in sorted(modules.items()):
        settings = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
        settings |= {k: v for k, v in module.items() if not isinstance(v, mx.array)}
        settings = {k: v for k, v in sorted(settings.items()) if _is_plain(v)}
        form.update(json.dumps([name, type(module).__qualname__, settings]).encode())
        for key, array in sorted(module.items()):
            if not isinstance(array, mx.array):
                continue
            form.update(f"{key} {array.shape} {array.dtype}".encode())
            if key.startswith("_"):  # a constant, such as the frequencies of a RoPE
                form.update(np.array(_bits(array)).tobytes())
            else:
                sums += _sums(array)
    mx.eval(sums)
    for array in sums:
        weights.update(np.array(array).tobytes())
    return Fingerprint(form.hexdigest(), weights.hexdigest())


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


def _bits(array: mx.array) -> mx.array:
    array = array.reshape(-1, array.shape[-1] if array.ndim else 1).view(mx.uint8)
    return array.view(mx.uint32) if array.shape[1] % 4 == 0 else array.astype(mx.uint32)


def _sums(array: mx.array) -> list[mx.array]:
    # Any changed number changes the sum of its row and that of its column; these are made
    # as fast as memory is read, and whole numbers have the same sum in any order.
    bits = _bits(array)
    return [bits.sum(axis=0), bits.sum(axis=1)]

"""The arrays of a module: to have them made at once, and where their precision matters."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .machine import on_cpu


def evaluate(*modules: nn.Module) -> None:
    """Make every array that modules hold, those that are no parameters among them.

    An array that waits to be computed belongs to the thread that asked for it: MLX
    refuses to compute it in another one, as a server's worker is. The frequencies of a
    scaled RoPE are such arrays, and no parameters.

    Args:
        *modules (nn.Module): Whose.
    """
    mx.eval([list(_arrays(module)) for root in modules for module in root.modules()])


def start_on(array: mx.array) -> None:
    """Let the device start on an array, while Python goes on."""
    try:
        mx.async_eval(array)
    except ValueError:  # MLX traces a function: there is nothing to start
        pass


def _arrays(module: nn.Module):
    # Submodules come by themselves.
    own = {k: v for k, v in module.items() if not isinstance(v, nn.Module)}
    for holder in (own, vars(module)):
        for _, value in tree_flatten(dict(holder)):
            if isinstance(value, mx.array):
                yield value


def is_imprecise(dtype: mx.Dtype) -> bool:
    """Return whether products of a dtype are worse here than its numbers are.

    On a CPU MLX adds the terms of a (quantised) product up in the dtype of its input:
    in bfloat16, 256 + 1 is 256.

    Args:
        dtype (mx.Dtype): Of a model's activations.
    """
    return on_cpu() and dtype in (mx.float16, mx.bfloat16)

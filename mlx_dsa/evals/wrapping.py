"""Other modules in place of a model's attention layers, to look at what these do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.nn as nn

from ..families import family_of


@contextmanager
def wrapping(model: nn.Module, wrappers: Mapping[int, nn.Module]) -> Iterator[None]:
    """Put modules in place of attention layers until the context ends.

    Args:
        model: patched or not.
        wrappers (dict): layer number to the module that is called in its place.
    """
    layers = family_of(model).layers(model)
    before = {i: layers[i].current for i in wrappers}
    try:
        for i, wrapper in wrappers.items():
            layers[i].put(wrapper)
        yield
    finally:
        for i, module in before.items():
            layers[i].put(module)

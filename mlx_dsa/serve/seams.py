"""What other parts of the server bring, where they are there."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .plain_cache import PlainCache


def part(name: str) -> Any:
    """Return a module of this package; ``None`` where there is none."""
    return import_module(f"{__package__}.{name}") if find_spec(f"{__package__}.{name}") else None


def make_prompt_cache(nbytes: int) -> Any:
    """Return what keeps states between requests.

    Args:
        nbytes (int): Bytes that it may hold.
    """
    return PlainCache(max_size=64, max_bytes=nbytes)

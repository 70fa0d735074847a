"""What mlx-lm's own prompt-cache files say to caches that they can't hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SAVE_WITH = (
    "caches of a patched model are saved with mlx_dsa.save_cache(path, caches, patch), "
    "not with save_prompt_cache, whose files can hold mlx-lm's own caches only"
)


class _NotForFiles:
    """End a cache's ``state``: ``save_prompt_cache`` refuses what is no number and no text,
    and says what it is. Whatever else reads a state looks for arrays in it."""

    def __str__(self) -> str:
        return SAVE_WITH


def marked(contents: Sequence[Any]) -> list[Any]:
    """Return contents as a state that mlx-lm can evaluate and can't save."""
    return [*contents, _NotForFiles()]


def unmarked(state: Sequence[Any]) -> list[Any]:
    """Return the contents in a state."""
    return [value for value in state if not isinstance(value, _NotForFiles)]

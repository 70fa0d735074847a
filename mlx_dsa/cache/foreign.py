"""What mlx-lm's own prompt-cache files say to caches that they can't hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAVE_WITH = (
    "caches of a patched model are saved with mlx_dsa.save_cache(path, caches, patch), "
    "not with save_prompt_cache, whose files can hold mlx-lm's own caches only"
)
_MARK = "not for files"


class _NotForFiles:
    """Be in a cache's ``state``: ``save_prompt_cache`` refuses what is no number and no text,
    and says what it is. Whatever else reads a state looks for arrays in it."""

    def __str__(self) -> str:
        return SAVE_WITH


def marked(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return contents as a state that mlx-lm can evaluate and can't save."""
    return {**contents, _MARK: _NotForFiles()}


def unmarked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents in a state."""
    return {name: value for name, value in state.items() if name != _MARK}

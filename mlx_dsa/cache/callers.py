"""Who asks: mlx-lm passes some options on to nobody, and its frames alone show them."""

from __future__ import annotations

import sys
from types import FrameType

# Frames between a method of a cache or a model and the function that is looked for.
_DEPTH = 8


def find_caller(module: str, *functions: str) -> FrameType | None:
    """Find the frame of a function that is being run.

    Args:
        module (str): Name of its module.
        *functions (str): Names; the nearest one counts.

    Returns:
        FrameType, optional: The frame, ``None`` where none of them is near.
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        frame = frame.f_back
        if frame is None:
            return None
        if frame.f_code.co_name in functions and frame.f_globals.get("__name__") == module:
            return frame
    return None

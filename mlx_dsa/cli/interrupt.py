"""Ctrl-C that ends an answer between two tokens, never inside a layer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupt:
    """A context in which a first Ctrl-C sets a flag and a second one stops.

    An exception in the middle of a step would leave layers that have seen
    different tokens; so the generation loop asks this object between steps.
    Calling it tells whether Ctrl-C was pressed.

    Args:
        pressed (callable, optional): Called at the first Ctrl-C. Default: ``None``.
    """

    def __init__(self, pressed: Callable[[], None] | None = None):
        self._tell = pressed
        self._pressed = False
        self._previous: Any = None  # a handler, as signal has them

    def __call__(self) -> bool:
        return self._pressed

    def __enter__(self) -> Interrupt:
        self._pressed = False
        # Python takes signal handlers from the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
        if self._tell is not None:
            self._tell()

"""What a process has freed, given back to the system while nobody waits."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable

_IDLE_SECONDS = 1.0


class Heap:
    """Have the C library give back what it keeps, once after each time of work.

    Where arrays come from it (MLX on the CPU of a Linux machine), glibc keeps what lies between
    those in use: after some hundred requests more than the arrays themselves.
    """

    def __init__(self) -> None:
        self._trim = _trimmer()
        self._busy_at: float | None = None

    def note(self, is_busy: bool) -> None:
        """Note whether there is work; called often, in the thread that has it."""
        now = time.monotonic()
        if is_busy:
            self._busy_at = now
        elif self._busy_at is not None and now - self._busy_at >= _IDLE_SECONDS:
            self._busy_at = None
            self._trim(0)


def _trimmer() -> Callable[[int], object]:
    if sys.platform.startswith("linux"):
        try:
            return ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError):  # another C library
            pass
    return lambda _pad: None

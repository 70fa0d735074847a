"""SIGTERM and SIGHUP as an orderly end: what a command has open is closed and deleted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# A closed terminal or a shutdown sends both, which must not stop the cleaning up. A signal
# that comes later asks again: the first may have been lost in someone's callback.
_GRACE = 5.0


@contextmanager
def orderly_end() -> Iterator[None]:
    """Turn a signal that would kill into SystemExit, with the exit code 128 + its number.

    Signals that are ignored (nohup) stay so, and so does a handler that is not the
    system's own.
    """
    received: list[tuple[int, float]] = []

    def end(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not received or now - received[-1][1] > _GRACE:
            received.append((number, now))
            raise SystemExit(128 + number)

    taken = []
    # Python takes signal handlers from the main thread only.
    if threading.current_thread() is threading.main_thread():
        taken = [n for n in _SIGNALS if signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except BaseException:
        # Cleaning up may fail in its turn, as writing to a terminal that has gone.
        if received:
            raise SystemExit(128 + received[0][0]) from None
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)

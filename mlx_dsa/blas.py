"""Load OpenBLAS before MLX on Linux."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")

HINT = (
    "OpenBLAS is not on this machine: install it (Debian, Ubuntu: sudo apt-get install "
    "libopenblas0) and matrix products on the CPU run about 30 times faster."
)


@functools.cache
def preload() -> bool:
    """Make OpenBLAS's symbols win over those of MLX's own BLAS.

    MLX's CPU wheel for Linux brings the reference BLAS. Symbols that are already
    in the process come first, so this has to run before ``mlx.core`` is imported
    for the first time. Elsewhere than on Linux it does nothing.

    OpenBLAS gets one core less than there are, unless OPENBLAS_NUM_THREADS says
    otherwise: its threads spin while they wait, and a step of decode needs a core to
    build the next step's graph (docs/log.md has the times).

    Returns:
        bool: Whether OpenBLAS was loaded.
    """
    if not sys.platform.startswith("linux"):
        return False
    n_cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, n_cores - 1)))
    for library in _LIBRARIES:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False

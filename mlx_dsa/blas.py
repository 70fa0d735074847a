"""Load OpenBLAS before MLX on Linux."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
_THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")

HINT = (
    "OpenBLAS is not on this machine: install it (Debian, Ubuntu: sudo apt-get install "
    "libopenblas0) and matrix products on the CPU run about 30 times faster."
)


TOO_LATE = (
    "mlx-dsa: mlx.core was imported before mlx_dsa, so MLX does not use OpenBLAS and matrix "
    "products on the CPU run about 30 times slower. Import mlx_dsa before mlx.core, mlx.nn "
    "and mlx_lm."
)


def is_loaded() -> bool:
    """Return whether OpenBLAS is in the process already.

    By the name that MLX or the user would have loaded it under: NumPy and SciPy bring
    copies under names of their own, which MLX does not use.
    """
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
        except OSError:
            continue
        return True
    return False


@functools.cache
def preload() -> bool:
    """Make OpenBLAS's symbols win over those of MLX's own BLAS.

    MLX's CPU wheel for Linux brings the reference BLAS. Symbols that are already
    in the process come first, so this has to run before ``mlx.core`` is imported
    for the first time. Elsewhere than on Linux it does nothing.

    OpenBLAS gets one core less than there are, unless the user has set its number of
    threads: they spin while they wait, and a step of decode needs a core to build the
    next step's graph (docs/log.md has the times).

    Returns:
        bool: Whether OpenBLAS was loaded.
    """
    if not sys.platform.startswith("linux"):
        return False
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if not any(variable in os.environ for variable in _THREADS):
            n_cores = len(os.sched_getaffinity(0))
            library.openblas_set_num_threads(max(1, n_cores - 1))
        return True
    return False

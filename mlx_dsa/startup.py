"""What has to be set before MLX starts; what the user has set stays."""

from __future__ import annotations

import os
import sys
import warnings

from . import blas

# MLX's CUDA backend compiles a graph of every new sequence of operations and keeps the
# last 400. A long prompt and the steps after it have more, and so made all anew.
_CUDA_GRAPHS = 3000
# It lets go of a command's arrays when a batch of commands is done, and a batch may hold
# gigabytes. With this, reading a long prompt takes as long and 4 to 8 GB less (docs/log.md).
_CUDA_BATCH_MB = 100


def prepare():
    """Load OpenBLAS; let MLX's CUDA backend keep the graphs of a whole prompt, and few of
    the arrays that it is done with."""
    os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", str(_CUDA_GRAPHS))
    if sys.platform != "darwin":  # Metal's own batches are smaller
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", str(_CUDA_BATCH_MB))
    late = _mlx_has_another_blas()
    if blas.preload() and late:
        warnings.warn(blas.TOO_LATE, stacklevel=3)  # where mlx_dsa is imported


def _mlx_has_another_blas() -> bool:
    """Return whether MLX is here already, computes on the CPU, and OpenBLAS is not."""
    mlx = sys.modules.get("mlx.core")  # not imported here: that would be too early
    if mlx is None or not sys.platform.startswith("linux") or blas.is_loaded():
        return False
    return mlx.default_device().type == mlx.DeviceType.cpu

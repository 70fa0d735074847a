"""What has to be set before MLX starts; what the user has set stays."""

from __future__ import annotations

import os

from . import blas

# MLX's CUDA backend compiles a graph of every new sequence of operations and keeps the
# last 400. A long prompt and the steps after it have more, and so made all anew.
_CUDA_GRAPHS = 3000


def prepare():
    """Load OpenBLAS, and let MLX's CUDA backend keep the graphs of a whole prompt."""
    os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", str(_CUDA_GRAPHS))
    blas.preload()

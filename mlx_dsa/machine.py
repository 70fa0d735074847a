"""Which device, machine and versions this is: asked here and nowhere else."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import mlx.core as mx

from .versions import package_version


def on_cpu() -> bool:
    """Return whether MLX computes on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def device_language() -> str | None:
    """Return what kernels of this device are written in: ``"metal"``, ``"cuda"`` or ``None``."""
    if on_cpu():
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


def runs_float32() -> bool:
    """Return whether models run in float32 here.

    On the CPU of a Linux machine MLX has no fast float16 or bfloat16 matrix product: they run
    about 30 times slower than float32 with OpenBLAS.
    """
    return sys.platform.startswith("linux") and on_cpu()


def device_name() -> str:
    """Return what the device calls itself."""
    return str(mx.device_info().get("device_name", mx.default_device()))


def device() -> dict[str, Any]:
    """Return the machine, as results state it."""
    about = ("device_name", "architecture", "memory_size")
    return {
        "device": str(mx.default_device()),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        **{name: value for name, value in mx.device_info().items() if name in about},
    }


def versions() -> dict[str, str]:
    """Return the versions of what takes part in a result."""
    packages = ("mlx-dsa", "mlx", "mlx-lm", "numpy")
    return {"python": platform.python_version(), **{name: package_version(name) for name in packages}}

"""Choose what runs an operation: a kernel that this device has and that is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import mlx.core as mx

from ..machine import device_language

_BACKENDS = ("auto", "reference", "metal", "cuda")
# What a kernel's result may differ by, as a share of the reference's largest value.
_TOLERANCE = 1e-2
# Operations whose kernels have run on a device and were faster there: "auto" takes
# no others. Names: "tile_scores", "index_scores", "select_topk", "gather",
# "tile_attention".
_PROVEN: dict[str, tuple[str, ...]] = {
    "cuda": ("tile_scores", "select_topk", "tile_attention"),
    "metal": (),
}
_verdicts: dict[tuple, bool] = {}


def check_backend(backend: str) -> None:
    """Raise unless a backend can run here.

    Args:
        backend (str): ``"auto"``, ``"reference"``, ``"metal"`` or ``"cuda"``.

    Raises:
        ValueError: If it is not known, or its device is not the default one.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"[ops] 'backend' must be one of {', '.join(_BACKENDS)} but got {backend!r}.")
    if backend in ("metal", "cuda") and backend != device_language():
        raise ValueError(
            f"[ops] 'backend' {backend!r} needs MLX to run on {_DEVICES[backend]}, and "
            f"here it runs on {mx.default_device()}. Use 'auto'."
        )


_DEVICES = {"metal": "an Apple GPU", "cuda": "an NVIDIA GPU"}


def crossover(top_k: int) -> int:
    """Return the keys from which sparse attention of a prompt is taken as the faster.

    Args:
        top_k (int): Keys that a query attends to.
    """
    # CPU and H200 as measured (docs/log.md); Apple GPUs by a guess that `tune` replaces.
    return {None: 1, "cuda": 8, "metal": 4}[device_language()] * top_k


def choose(
    backend: str,
    name: str,
    gap: Callable[[str], str | None],
    trial: Callable[[str], tuple],
    *key,
) -> str | None:
    """Choose the language of the kernel to run.

    ``"auto"`` takes kernels that have been proven on a device. It tries one on random
    inputs the first time, and leaves it where it fails or differs from the reference.

    Args:
        backend (str): The user's choice.
        name (str): The operation, for messages.
        gap (callable): Language to what the kernel can't do with these inputs, or
          ``None``.
        trial (callable): Language to the kernel's result and the reference's.
        *key: What a kernel is compiled for: one trial each.

    Returns:
        str or None: ``"metal"``, ``"cuda"``, or ``None`` for the reference.

    Raises:
        ValueError: If the backend can't run here, or not with these inputs.
    """
    check_backend(backend)
    language = None if backend == "reference" else device_language()
    if language is None or (backend == "auto" and name not in _PROVEN[language]):
        return None
    reason = gap(language)
    if backend == "auto":
        fits = reason is None and _trusted(language, name, trial, key)
        return language if fits else None
    if reason is not None:
        raise ValueError(f"[{name}] 'backend' can't be {backend!r}: {reason}. Use 'auto'.")
    return language


def _trusted(language, name, trial, key) -> bool:
    key = (language, name, *key)
    if key not in _verdicts:
        problem = _problem(language, trial)
        _verdicts[key] = problem is None
        if problem:
            warnings.warn(
                f"mlx-dsa: the {language} kernel of {name} {problem}; plain MLX operations take its place.",
                stacklevel=4,
            )
    return _verdicts[key]


def _problem(language, trial) -> str | None:
    try:
        result, expected = trial(language)
        mx.eval(result, expected)
    except Exception as error:  # whatever a compiler or a driver says
        return f"does not run here ({str(error).strip().splitlines()[0][:120]})"
    exact = mx.issubdtype(expected.dtype, mx.integer)
    expected = expected.astype(mx.float32)
    gap = float(mx.abs(result.astype(mx.float32) - expected).max())
    limit = 0 if exact else _TOLERANCE * float(mx.abs(expected).max())
    # Not "gap > limit": that is false of NaN.
    return None if gap <= limit else f"differs from the reference by {gap:.2g}"

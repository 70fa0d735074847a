"""Build and launch the kernels in ``kernels/``, in Metal's language or CUDA's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

_FOLDER = Path(__file__).parent / "kernels"
_HEADERS = {"metal": ("prelude.metal",), "cuda": ("prelude.cuh", "ptx.cuh")}
# Both languages share a body in a .h file. MLX looks for Metal's names for the place
# of a thread in the body itself, so they are spelled out there.
_PLACES = {
    "metal": (
        "const int thread_index = thread_index_in_threadgroup;\n"
        "const int group_index = threadgroup_position_in_grid.x;\n"
    ),
    "cuda": "const int thread_index = threadIdx.x, group_index = blockIdx.x;\n",
}


class Source(NamedTuple):
    """A kernel: the names of its arrays, and its text in each language.

    Args:
        inputs (tuple of str): Arrays it reads.
        outputs (tuple of str): Arrays it writes.
        files (dict): Language to file name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    files: dict[str, str]


SOURCES = {
    "score": Source(
        ("queries", "weights", "keys"),
        ("scores",),
        {"metal": "score.metal", "cuda": "score.cu"},
    ),
    "select": Source(
        ("scores", "n_visible", "limits"),
        ("slots",),
        {"metal": "select.h", "cuda": "select.h"},
    ),
    "gather": Source(
        ("keys", "values", "slots"),
        ("tile_keys", "tile_values"),
        {"metal": "gather.h", "cuda": "gather.h"},
    ),
    # Metal gathers, and leaves the rest to MLX's own attention.
    "attend": Source(
        ("queries", "keys", "values", "slots", "scale"),
        ("output",),
        {"cuda": "attend.cu"},
    ),
}


def text(name: str, language: str) -> tuple[str, str]:
    """Read a kernel.

    Args:
        name (str): Its name in ``SOURCES``.
        language (str): ``"metal"`` or ``"cuda"``.

    Returns:
        tuple: What stands before the function, and the function's body.
    """
    file = SOURCES[name].files[language]
    header = "\n".join(_read(h) for h in _HEADERS[language])
    body = _read(file)
    return header, (_PLACES[language] if file.endswith(".h") else "") + body


def launch(
    name: str,
    language: str,
    inputs: list[mx.array],
    constants: dict[str, int | bool | mx.Dtype],
    groups: tuple[int, int, int],
    n_threads: int,
    shapes: list[tuple[int, ...]],
    dtypes: list[mx.Dtype],
    shared_bytes: int = 0,
) -> list[mx.array]:
    """Run a kernel.

    Args:
        name (str): Its name in ``SOURCES``.
        language (str): ``"metal"`` or ``"cuda"``.
        inputs (list of mx.array): Read in place, whatever their strides.
        constants (dict): What the body takes as known when it is compiled.
        groups (tuple of int): Thread groups in x, y and z.
        n_threads (int): Threads a group.
        shapes (list of tuple): Of the outputs.
        dtypes (list of mx.Dtype): Of the outputs.
        shared_bytes (int): Shared memory that the text does not size (CUDA).
          Default: ``0``.

    Returns:
        list of mx.array: The outputs.
    """
    return _build(name, language, shared_bytes)(
        inputs=inputs,
        template=list(constants.items()),
        grid=(groups[0] * n_threads, groups[1], groups[2]),
        threadgroup=(n_threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )


@cache
def _build(name: str, language: str, shared_bytes: int) -> Callable:
    make: Callable[..., Any] = mx.fast.metal_kernel
    if language == "cuda":
        make = partial(mx.fast.cuda_kernel, shared_memory=shared_bytes)
    header, body = text(name, language)
    # MLX keeps what it compiled on disk, by name: another text needs another name.
    digest = hashlib.sha256(f"{header}{body}{shared_bytes}".encode()).hexdigest()[:8]
    return make(
        name=f"mlx_dsa_{name}_{digest}",
        input_names=list(SOURCES[name].inputs),
        output_names=list(SOURCES[name].outputs),
        header=header,
        source=body,
        # A copy of a whole cache a call would cost more than the kernel.
        ensure_row_contiguous=False,
    )


def _read(file: str) -> str:
    return (_FOLDER / file).read_text(encoding="utf-8")

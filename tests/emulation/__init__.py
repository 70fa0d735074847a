"""Run a kernel's own text on the CPU: compiled as C++ under a header that emulates.

``launch`` takes the place of ``mlx_dsa.ops.kernel.launch``.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dsa.ops import kernel

HERE = Path(__file__).parent
COMPILER = next(filter(shutil.which, (os.environ.get("CXX", "g++"), "clang++")), None)
TYPES = {
    mx.float32: "float",
    mx.float16: "half",
    mx.bfloat16: "bfloat",
    mx.int32: "int",
}
# What stands before a kernel, but for CUDA's instructions: the emulation has them.
HEADERS = {"metal": ["prelude.metal"], "cuda": ["prelude.cuh"]}


def launch(name, language, inputs, constants, groups, n_threads, shapes, dtypes, shared_bytes=0):
    """Run a kernel on the CPU: see ``mlx_dsa.ops.kernel.launch``."""
    assert n_threads % 32 == 0 and n_threads <= 1024
    kinds = tuple(a.dtype for a in inputs), tuple(dtypes)
    run = build(name, language, kinds, tuple(constants.items()))
    names = kernel.SOURCES[name].inputs
    arrays = [
        with_gaps(bits(a)) if n in ("keys", "values") or (name, n) == ("attend", "queries") else bits(a)
        for n, a in zip(names, inputs)
    ]
    # What a kernel does not write stays recognisable.
    outputs = [np.full(mx.zeros(s, d).nbytes, 0x7F, np.uint8) for s, d in zip(shapes, dtypes)]
    arguments = []
    for array in arrays:
        shape = np.array(array.shape, np.int32)
        strides = np.array(array.strides, np.int64) // array.itemsize
        arguments += [array, shape, strides]
    arguments += outputs
    run(
        (ctypes.c_void_p * len(arguments))(*(a.ctypes.data for a in arguments)),
        (ctypes.c_int * 4)(*groups, n_threads),
    )
    return [mx.array(o.view(storage(d)).reshape(s)).view(d) for o, s, d in zip(outputs, shapes, dtypes)]


def storage(dtype):
    return {2: np.uint16, 4: np.int32}[dtype.size]


def bits(array):
    """Return an array's bits in NumPy, in one piece."""
    return np.array(array.view({2: mx.uint16, 4: mx.int32}[array.dtype.size]))


def with_gaps(array):
    """Return the same array with room after its rows, as a cache hands it over."""
    B, H, T, D = array.shape
    room = np.full((B, H, T + 3, D), 0x7F7F, array.dtype)
    room[:, :, :T] = array
    return room[:, :, :T]


@cache
def build(name, language, kinds, constants):
    """Compile a kernel for one choice of dtypes and constants."""
    source = kernel.SOURCES[name]
    _, body = kernel.text(name, language)
    header = "\n".join((kernel._FOLDER / h).read_text() for h in HEADERS[language])
    parameters, arguments, place = [], [], itertools.count()
    for array, dtype in zip(source.inputs, kinds[0]):
        parameters += [
            f"const {TYPES[dtype]}* {array}",
            f"const int* {array}_shape",
            f"const int64_t* {array}_strides",
        ]
    parameters += [f"{TYPES[d]}* {a}" for a, d in zip(source.outputs, kinds[1])]
    arguments = [f"({p.rsplit(' ', 1)[0]})arrays[{next(place)}]" for p in parameters]
    known = [
        f"using {key} = {TYPES[value]};"
        if isinstance(value, mx.Dtype)
        else f"constexpr {type(value).__name__} {key} = {str(value).lower()};"
        for key, value in constants
    ]
    code = "\n".join(
        [
            f'#include "{language}.h"',
            header,
            f"static void kernel({', '.join(parameters)}) {{",
            *known,
            body,
            "}",
            'extern "C" void run(void** arrays, const int* size) {',
            "  uint3 grid = {unsigned(size[0]), unsigned(size[1]), unsigned(size[2])};",
            f"  emulation::run(grid, size[3], [=] {{ kernel({', '.join(arguments)}); }});",
            "}",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        text = library.with_suffix(".cpp")
        text.write_text(code)
        subprocess.run(
            [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}"] + ["-o", str(library), str(text)],
            check=True,
        )
        return ctypes.CDLL(str(library)).run

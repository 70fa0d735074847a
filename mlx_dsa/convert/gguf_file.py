"""Some tensors of a GGUF file, without the rest of what may be many gigabytes."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

# Number of a type of metadata -> how struct reads it; 8 is a string, 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
_STRING, _ARRAY = 8, 9
# Number of a type of tensor -> its name, bytes a block, numbers a block.
_TYPES = {0: ("F32", 4, 1), 1: ("F16", 2, 1), 8: ("Q8_0", 34, 32), 30: ("BF16", 2, 1)}
_MOST = 1 << 28  # of anything that a header counts


class GGUFFile:
    """Look into a GGUF file.

    Args:
        path (Path): The file.

    Attributes:
        metadata (dict): Its keys and values; arrays are left out.
        tensors (dict): Name to shape, rows first, type's number and place.

    Raises:
        ValueError: If it is damaged, or of a version before 2 or after 3.
    """

    def __init__(self, path: Path):
        self._path = path
        self._size = path.stat().st_size
        with path.open("rb") as file:
            try:
                self._read_header(file)
            except (struct.error, UnicodeDecodeError, OverflowError):
                raise self._damaged() from None

    def _damaged(self) -> ValueError:
        return ValueError(f"[read_projections] {self._path} is damaged or not a GGUF file. Download or copy it again.")

    def _read_header(self, file: BinaryIO):
        magic, version = struct.unpack("<4sI", file.read(8))
        if magic != b"GGUF":
            raise self._damaged()
        if version not in (2, 3):
            raise ValueError(f"[read_projections] {self._path} is GGUF of version {version}, not 2 or 3.")
        n_tensors, n_values = self._numbers(file, "QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(self._counted(n_values)):
            key = self._string(file)
            value = self._value(file, *self._numbers(file, "I"))
            if value is not None:
                self.metadata[key] = value
        self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(self._counted(n_tensors)):
            name = self._string(file)
            (n_dims,) = self._numbers(file, "I")
            if n_dims > 8:
                raise self._damaged()
            *shape, kind, place = self._numbers(file, f"{n_dims}QIQ")
            self.tensors[name] = tuple(reversed(shape)), kind, place
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self._damaged()
        self._start = -(-file.tell() // alignment) * alignment

    def _counted(self, n: int) -> int:
        # Each thing that is counted takes a byte or more.
        if n > min(_MOST, self._size):
            raise self._damaged()
        return n

    def _numbers(self, file, form: str) -> tuple:
        form = f"<{form}"
        return struct.unpack(form, file.read(struct.calcsize(form)))

    def _string(self, file) -> str:
        (length,) = self._numbers(file, "Q")
        text = file.read(self._counted(length))
        if len(text) != length:
            raise self._damaged()
        return text.decode("utf-8")

    def _value(self, file, kind: int) -> Any:
        """Read a value of metadata; pass over an array."""
        if kind in _SCALARS:
            return self._numbers(file, _SCALARS[kind])[0]
        if kind == _STRING:
            return self._string(file)
        if kind != _ARRAY:
            raise self._damaged()
        of, n = self._numbers(file, "IQ")
        self._counted(n)
        if of in _SCALARS:
            file.seek(n * struct.calcsize(f"<{_SCALARS[of]}"), 1)
        elif of == _STRING:
            for _ in range(n):
                (length,) = self._numbers(file, "Q")
                file.seek(self._counted(length), 1)
        else:
            raise self._damaged()
        return None

    def read(self, name: str) -> mx.array:
        """Return a tensor, rows first; 8-bit blocks as float16.

        Raises:
            ValueError: If its type is not known, or it does not lie in the file.
        """
        shape, kind, place = self.tensors[name]
        if kind not in _TYPES:
            known = ", ".join(of for of, *_ in _TYPES.values())
            raise ValueError(
                f"[read_projections] {name!r} in {self._path} is of GGUF type {kind}: known are "
                f"{known}. Convert the checkpoint that it was made from."
            )
        of, n_bytes, n_numbers = _TYPES[kind]
        count = math.prod(shape)
        if count % n_numbers or (n_numbers > 1 and shape[-1] % n_numbers):
            raise self._damaged()
        length = count // n_numbers * n_bytes
        if self._start + place + length > self._size:
            raise self._damaged()
        with self._path.open("rb") as file:
            file.seek(self._start + place)
            data = file.read(length)
        if of == "Q8_0":
            blocks = np.frombuffer(data, dtype=[("scale", "<f2"), ("numbers", "i1", n_numbers)])
            scales = blocks["scale"].astype(np.float32)[:, None]
            return mx.array((scales * blocks["numbers"]).astype(np.float16).reshape(shape))
        if of == "BF16":
            return mx.array(np.frombuffer(data, "<u2").reshape(shape)).view(mx.bfloat16)
        return mx.array(np.frombuffer(data, "<f4" if of == "F32" else "<f2").reshape(shape))

"""Tensors of a PyTorch checkpoint, read by a pickle machine that can call nothing.

``torch.save`` writes a zip: ``data.pkl`` says which tensors there are, ``data/<key>`` has their
bytes. The machine here knows the opcodes that build plain values, and makes records of the few
functions that rebuild tensors; it imports no name and calls no object, whatever the pickle asks.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

# Kind of storage -> how NumPy reads it; BFloat16 as its bits.
_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1",
    "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
_DTYPES = ("float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool").split()
_REBUILDS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
# What a pickle may name. All else is refused.
_KNOWN = {
    *(("torch", name) for name in (*_STORAGES, *_DTYPES, "Size")),
    *(("torch._utils", name) for name in _REBUILDS),
    ("collections", "OrderedDict"),
}
_MOST_VALUES = 10_000_000
_LARGEST_PICKLE = 1 << 28
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
}  # fmt: skip
_MARK = object()


class Name(NamedTuple):
    """A name that a pickle has asked for; never what it stands for."""

    module: str
    name: str


class Storage(NamedTuple):
    """Bytes of the zip: how they are read, their key, and how many numbers they are."""

    kind: str
    key: str
    size: int


class Tensor(NamedTuple):
    """A look into a storage, in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """Look into a checkpoint of ``torch.save`` without executing anything in it.

    Args:
        path (Path): The file.

    Attributes:
        tensors (dict): Name, with dots between the keys that lead there, to :class:`Tensor`.

    Raises:
        ValueError: If it is damaged, or holds more than tensors and plain values.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                pickles = [n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
                if len(pickles) != 1:
                    raise self._refused("has no data.pkl")
                self._root = pickles[0].removesuffix("data.pkl")
                if f"{self._root}byteorder" in archive.namelist():
                    if self._stored(archive, "byteorder") != b"little":
                        raise self._refused("was written by a big-endian machine")
                pickled = self._stored(archive, "data.pkl", _LARGEST_PICKLE)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise self._refused(f"is damaged ({error})") from None
        try:
            top = self._run(pickled)
        # Of a pickle that is none: values that are missing, of another kind, or not hashable.
        except (IndexError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._refused("is damaged: its data.pkl makes no sense") from None
        self.tensors: dict[str, Tensor] = {}
        self._collect(top)

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"[read_projections] {self._path} {why}. Nothing in it was executed.")

    def _stored(self, archive: zipfile.ZipFile, name: str, most: int = 1 << 62) -> bytes:
        try:
            info = archive.getinfo(self._root + name)
        except KeyError:
            raise self._refused(f"is damaged: {name} is missing") from None
        # What is compressed may be far larger than the file.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
            raise self._refused(f"is not as torch.save writes it: {name} is compressed or too large")
        return archive.read(info)

    def _run(self, pickled: bytes) -> Any:
        """Return the plain values that a pickle describes, tensors as records."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        try:
            for n, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
                if opcode.name == "STOP":
                    (top,) = stack
                    return top
                if n > _MOST_VALUES:
                    raise self._refused("holds too many values")
                self._step(opcode.name, argument, stack, memo)
        except ValueError as error:
            if str(error).startswith("[read_projections]"):
                raise
        raise self._refused("is damaged: its data.pkl makes no sense") from None

    def _step(self, name: str, argument: Any, stack: list[Any], memo: dict[int, Any]):
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else _since_mark(stack)
            _of(list, stack).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [stack.pop() for _ in "kv"][::-1] if name == "SETITEM" else _since_mark(stack)
            _of(dict, stack).update(zip(values[::2], values[1::2]))
        elif name == "GLOBAL":
            stack.append(self._name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            of = stack.pop()
            stack.append(self._name(stack.pop(), of))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._rebuilt(stack.pop(), arguments))
        elif name == "BUILD":
            # Of a state dict: its _metadata, which is of no use here.
            stack.pop()
            _of(dict, stack)
        else:
            raise self._refused(f"holds more than tensors: its pickle uses {name}")

    def _name(self, module: str, name: str) -> Name:
        if (module, name) not in _KNOWN:
            raise self._refused(f"holds {module}.{name}, which is no tensor")
        return Name(module, name)

    def _storage(self, told: Any) -> Storage:
        tag, of, key, _, size = told
        if tag != "storage" or not isinstance(of, Name) or of.name not in _STORAGES:
            raise self._refused("holds a kind of storage that is not known")
        if type(key) is not str or type(size) is not int:
            raise TypeError
        return Storage(of.name, key, size)

    def _rebuilt(self, of: Name, arguments: tuple) -> Any:
        """Return what a call stands for; none is made."""
        if not isinstance(of, Name) or type(arguments) is not tuple:
            raise TypeError
        if of.name == "OrderedDict":
            return dict(*arguments)
        if of.name == "Size":
            return tuple(*arguments)
        if of.name == "_rebuild_parameter":
            return _of(Tensor, list(arguments[:1]))
        if of.name not in _REBUILDS:
            raise self._refused(f"calls {of.module}.{of.name}, which makes no tensor")
        storage, offset, shape, strides = arguments[:4]
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or len(shape) != len(strides):
            raise TypeError
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise TypeError
        return Tensor(storage, offset, tuple(shape), tuple(strides))

    def _collect(self, top: Any):
        """Find tensors in dicts and lists, one that holds itself included."""
        waiting, seen = [("", top)], set()
        while waiting:
            name, value = waiting.pop()
            if isinstance(value, Tensor):
                self.tensors[name] = value
            elif isinstance(value, dict | list) and id(value) not in seen:
                seen.add(id(value))
                pairs = value.items() if isinstance(value, dict) else enumerate(value)
                waiting += [(f"{name}.{key}" if name else str(key), x) for key, x in pairs]

    def read(self, tensor: Tensor) -> mx.array:
        """Return the numbers of a tensor; float64 as float32.

        Raises:
            ValueError: If they do not lie in the file.
        """
        storage, offset, shape, strides = tensor
        dtype = np.dtype(_STORAGES[storage.kind])
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
        if storage.size < 1 or 0 in shape or last >= storage.size:
            raise self._refused("is damaged: a tensor reaches beyond its storage")
        # A broadcast tensor may be far larger than what is stored.
        if math.prod(shape) > storage.size:
            raise self._refused("is damaged: a tensor is larger than its storage")
        try:
            with zipfile.ZipFile(self._path) as archive:
                data = self._stored(archive, f"data/{storage.key}")
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise self._refused(f"is damaged ({error})") from None
        if len(data) < storage.size * dtype.itemsize:
            raise self._refused("is damaged: a storage is cut off")
        numbers = np.frombuffer(data, dtype, storage.size)[offset:]
        steps = tuple(stride * dtype.itemsize for stride in strides)
        view = np.lib.stride_tricks.as_strided(numbers, shape, steps, writeable=False)
        view = np.ascontiguousarray(view)
        if storage.kind == "BFloat16Storage":
            return mx.array(view).view(mx.bfloat16)
        return mx.array(view.astype(np.float32) if dtype == np.float64 else view)


def _since_mark(stack: list[Any]) -> list[Any]:
    """Take what lies above the last mark, and the mark."""
    at = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), None)
    if at is None:
        raise IndexError
    values = stack[at + 1 :]
    del stack[at:]
    return values


def _of(kind: type, stack: list[Any]) -> Any:
    """Return the top of a stack, which must be of a kind."""
    if not isinstance(stack[-1], kind):
        raise TypeError
    return stack[-1]

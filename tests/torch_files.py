"""Files as torch.save writes them, without PyTorch: its pickle names and its zip."""

import collections
import io
import pickle
import sys
import zipfile
from types import ModuleType

import numpy as np

_KINDS = {"f8": "Double", "f4": "Float", "f2": "Half", "u2": "BFloat16", "i8": "Long", "u1": "Byte"}


class Storage:
    def __init__(self, array):
        self.array = array


class Saved:
    """An array that is pickled as a tensor: `strides` and `shape` in numbers, from `offset` on."""

    def __init__(self, array, shape=None, strides=None, offset=0, parameter=False):
        array = np.asarray(array)
        self.storage = Storage(array)
        self.shape = array.shape if shape is None else shape
        self.strides = strides or tuple(s // array.itemsize for s in array.strides)
        self.offset, self.parameter = offset, parameter

    def __reduce__(self):
        utils = sys.modules["torch._utils"]
        if self.parameter:
            whole = Saved(self.storage.array, self.shape, self.strides, self.offset)
            return utils._rebuild_parameter, (whole, True, collections.OrderedDict())
        told = (self.storage, self.offset, self.shape, self.strides, False, collections.OrderedDict())
        return utils._rebuild_tensor_v2, told


def _stand_in(name, module):
    made = type(name, (), {})
    made.__module__, made.__qualname__ = module, name
    return made


def _modules():
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    for kind in _KINDS.values():
        setattr(torch, f"{kind}Storage", _stand_in(f"{kind}Storage", "torch"))
    torch.Size = _stand_in("Size", "torch")
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(utils, name, _stand_in(name, "torch._utils"))
    return {"torch": torch, "torch._utils": utils}


def write_torch(
    path, value, *, protocol=2, root="archive", pickled=None, byteorder=b"little", compression=zipfile.ZIP_STORED, cut=0
):
    """Write `value`, in which tensors are `Saved`; or the bytes of a pickle in its place."""
    storages = {}
    modules = _modules()

    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            if not isinstance(x, Storage):
                return None
            key = storages.setdefault(id(x), (str(len(storages)), x.array))[0]
            kind = getattr(modules["torch"], f"{_KINDS[x.array.dtype.str[1:]]}Storage")
            return "storage", kind, key, "cpu", x.array.size

    if pickled is None:
        before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        try:
            stream = io.BytesIO()
            Pickler(stream, protocol).dump(value)
            pickled = stream.getvalue()
        finally:
            for name, module in before.items():
                sys.modules.pop(name)
                if module is not None:
                    sys.modules[name] = module
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, array in storages.values():
            data = array.tobytes()
            archive.writestr(f"{root}/data/{key}", data[: len(data) - cut])
    return path

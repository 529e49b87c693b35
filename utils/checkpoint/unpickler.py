"""Unpickler for plain data: it imports nothing, and calls only a few functions of this module.

PyTorch's `weights_only` unpickler comes first (see weights_file.py). It refuses files with other classes, as training
checkpoints often have: a yacs CfgNode, an argparse.Namespace, NumPy scalars. This one reads them, by three rules:

- A name is looked up in a fixed table as a whole. Nothing is imported, and a dot in a name has no meaning.
- A pickle cannot alter what the table returns. Its BUILD instruction calls __setstate__, or else sets attributes: all
  classes here have a __setstate__, and functions are wrapped in `Call`, which has no attributes to set.
- Other packages' classes are replaced by inert stand-ins: dictionaries without methods of their own, or `Inert`.

torch.serialization.safe_globals does not replace it (torch 2.6 to 2.14). With stand-ins in its list, PyTorch's
unpickler refuses all attacks in the tests too, but it reads no pickle protocol above 2, and of unknown objects, which
OpenMMLab's files have, no lists, no deques and none with slots: it fills only dict, OrderedDict, Counter and list.
get_unsafe_globals_in_checkpoint, which would name the objects, reads neither those protocols nor the legacy format.
"""

import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

PLAIN_DTYPE = re.compile(r"[biufc]\d{1,2}|[SU]\d{1,6}")
# Modules of Python by which plain objects of other packages are pickled, besides builtins.getattr.
BUILDING_BLOCKS = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "functools", "pathlib", "types"}


class RefusedObjectError(pickle.UnpicklingError):
    """A pickle contains an object that is not plain data; `name` says which."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not plain data")
        self.name = name


class Call:
    """Function that a pickle may call, in a wrapper that it cannot alter."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"a pickle tried to set {name} of a function")


class ConfigNode(dict[Any, Any]):
    """Stand-in for a yacs CfgNode: its keys and values."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the state, which says whether the node is frozen."""


class Arguments(dict[Any, Any]):
    """Stand-in for an argparse.Namespace: its attributes as keys and values."""

    __slots__ = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


class Inert:
    """Stand-in for an unknown object: accepts whatever a pickle does with it, and keeps none of it."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __call__(self, *_: Any, **__: Any) -> "Inert":
        return self

    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def append(self, item: object) -> None: ...
    def extend(self, items: object) -> None: ...
    def add(self, item: object) -> None: ...


class Dtype:
    """Stand-in for a numpy.dtype until its byte order is known."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any) -> None:
        if not (isinstance(code, str) and PLAIN_DTYPE.fullmatch(code)):
            raise RefusedObjectError(f"a NumPy array of type {code!r}")
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a NumPy type of unknown byte order")
        self.order = state[1]

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class Array(np.ndarray):
    """NumPy array of numbers or text, which the pickle's next instruction fills."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:  # type: ignore[override]
        version, shape, dtype, is_fortran, data = state
        if not (isinstance(dtype, Dtype) and isinstance(data, bytes)):
            raise pickle.UnpicklingError("a NumPy array of objects")
        super().__setstate__((version, shape, dtype.resolve(), is_fortran, data))


def make_array(*_: Any) -> Array:
    return Array((0,), dtype=np.uint8)


def make_scalar(dtype: Any, data: Any) -> Any:
    """Return a NumPy scalar as a Python number."""
    if not (isinstance(dtype, Dtype) and isinstance(data, bytes)):
        raise pickle.UnpicklingError("a NumPy scalar that is not a number")
    (value,) = np.frombuffer(data, dtype.resolve())
    return value.item()


def make_tensor(storage: Any, offset: int, size: Iterable[int], stride: Iterable[int], *_: Any) -> Tensor:
    """Return a tensor, without the hooks, names and requires_grad that may be stored with it."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without a storage")
    size, stride = tuple(size), tuple(stride)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and not 0 <= offset <= last < storage._size():
        raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def to_bytes(text: str, encoding: str) -> bytes:
    """Return bytes, which protocol 2 stores as Latin-1 text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def to_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


ALLOWED: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): Arguments,
    ("yacs.config", "CfgNode"): ConfigNode,
    ("builtins", "set"): Call(set),
    ("collections", "OrderedDict"): Call(OrderedDict),
    ("_codecs", "encode"): Call(to_bytes),
    ("torch", "Size"): Call(torch.Size),
    ("torch", "device"): Call(torch.device),
    ("torch._utils", "_rebuild_tensor_v2"): Call(make_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(lambda data, *_: data),
    ("numpy", "dtype"): Call(Dtype),
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Call(make_array) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Call(make_scalar) for core in ("core", "_core")},
    **{(module, "PosixPath"): Call(to_path) for module in ("pathlib", "pathlib._local")},
    **{("torch", str(value)[6:]): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


class PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Unpickler whose `load` raises RefusedObjectError for each name that is not in the table.

    In Python: the one in C takes memory up to the largest index in a pickle, 64 GiB for a file of 300 bytes.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        # Protocol 2 stores Python's modules under their names in Python 2.
        module_name, global_name = NAME_MAPPING.get((module_name, global_name), (module_name, global_name))
        module_name = IMPORT_MAPPING.get(module_name, module_name)
        if (module_name, global_name) not in ALLOWED:
            return self.find_unknown(module_name, global_name)
        return ALLOWED[module_name, global_name]

    def find_unknown(self, module_name: str, global_name: str) -> Any:
        raise RefusedObjectError(f"{module_name}.{global_name}")


class TolerantUnpickler(PlainUnpickler):
    """Replaces other packages' objects by inert stand-ins.

    Those of Python, PyTorch and NumPy that are not in the table are still refused: a file has them to call them.
    """

    def find_unknown(self, module_name: str, global_name: str) -> Any:
        package = module_name.split(".")[0]
        is_known = package in sys.stdlib_module_names or package in ("torch", "torchvision", "numpy")
        is_building_block = package in BUILDING_BLOCKS or (module_name, global_name) == ("builtins", "getattr")
        if is_known and not is_building_block:
            super().find_unknown(module_name, global_name)
        return Inert


def pickle_module(*, tolerant: bool) -> Any:
    """Return a `pickle_module` for torch.load.

    Args:
        tolerant: replace unknown objects of other packages by inert stand-ins, instead of refusing the file.
    """
    unpickler = TolerantUnpickler if tolerant else PlainUnpickler
    return SimpleNamespace(
        __name__="utils.checkpoint.unpickler",
        Unpickler=unpickler,
        load=lambda file, **options: unpickler(file, **options).load(),
    )

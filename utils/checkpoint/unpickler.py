"""Unpickling that yields plain data only: no import, no call but of a few functions written here.

PyTorch's own `weights_only` unpickler comes first (see weights_file.py). It refuses every file with a class of
its own in it, as training checkpoints often have: a yacs CfgNode, an argparse.Namespace, NumPy scalars. This one reads
those, under three rules:

- A name is looked up, whole, in a fixed table. Nothing is imported, and a dot in a name leads nowhere.
- What the table gives cannot be altered from within a pickle, whose BUILD instruction sets attributes on anything but
  where there is a __setstate__, which is then called: functions are sealed, and all classes have one.
- Classes of others are replaced by inert stand-ins: dictionaries without methods of their own, or nothing at all.
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
# Of Python's own modules, those that plain objects of other packages are pickled with, as is builtins.getattr.
BUILDING_BLOCKS = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "functools", "pathlib", "types"}


class RefusedObjectError(pickle.UnpicklingError):
    """A pickle names an object that is not plain data; `name` says which."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not plain data")
        self.name = name


class Call:
    """A function that a pickle may call, in a shell that it cannot alter."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"a pickle tried to set {name} of a function")


class ConfigNode(dict[Any, Any]):
    """Stands for a yacs CfgNode: its keys and values."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Whether the node was frozen and the like is of no use."""


class Arguments(dict[Any, Any]):
    """Stands for an argparse.Namespace: its attributes, as keys and values."""

    __slots__ = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


class Inert:
    """Stands for an object of which nothing is known. It takes whatever a pickle does with it, and keeps none of it."""

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
    """Stands for a numpy.dtype until its byte order is known."""

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
    """A NumPy array of numbers or text, filled by the pickle's next instruction."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:  # type: ignore[override]
        version, shape, dtype, is_fortran, data = state
        if not (isinstance(dtype, Dtype) and isinstance(data, bytes)):
            raise pickle.UnpicklingError("a NumPy array of objects")
        super().__setstate__((version, shape, dtype.resolve(), is_fortran, data))


def make_array(*_: Any) -> Array:
    return Array((0,), dtype=np.uint8)


def make_scalar(dtype: Any, data: Any) -> Any:
    """A NumPy scalar's value as a Python number."""
    if not (isinstance(dtype, Dtype) and isinstance(data, bytes)):
        raise pickle.UnpicklingError("a NumPy scalar that is no number")
    (value,) = np.frombuffer(data, dtype.resolve())
    return value.item()


def make_tensor(storage: Any, offset: int, size: Iterable[int], stride: Iterable[int], *_: Any) -> Tensor:
    """A tensor without what else may be stored with it: hooks, names, a wish for gradients."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without a storage")
    size, stride = tuple(size), tuple(stride)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and not 0 <= offset <= last < storage._size():
        raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def to_bytes(text: str, encoding: str) -> bytes:
    """Protocol 2 writes bytes as text of one byte a letter."""
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


class PlainUnpickler(pickle.Unpickler):
    """Refuses every name that is not in the table.

    Raises:
        RefusedObjectError: from `load`, at such a name.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        # Protocol 2 writes Python's own modules under the names that they had in Python 2.
        module_name, global_name = NAME_MAPPING.get((module_name, global_name), (module_name, global_name))
        module_name = IMPORT_MAPPING.get(module_name, module_name)
        if (module_name, global_name) not in ALLOWED:
            return self.find_unknown(module_name, global_name)
        return ALLOWED[module_name, global_name]

    def find_unknown(self, module_name: str, global_name: str) -> Any:
        raise RefusedObjectError(f"{module_name}.{global_name}")


class TolerantUnpickler(PlainUnpickler):
    """Puts inert stand-ins in the place of other packages' objects; refuses those of Python, PyTorch and NumPy still,
    which are in a file to be called.
    """

    def find_unknown(self, module_name: str, global_name: str) -> Any:
        package = module_name.split(".")[0]
        is_known = package in sys.stdlib_module_names or package in ("torch", "torchvision", "numpy")
        is_building_block = package in BUILDING_BLOCKS or (module_name, global_name) == ("builtins", "getattr")
        if is_known and not is_building_block:
            super().find_unknown(module_name, global_name)
        return Inert


def pickle_module(*, tolerant: bool) -> Any:
    """What torch.load takes as pickle_module.

    Args:
        tolerant: replace unknown objects of other packages by inert stand-ins, instead of refusing the file.
    """
    unpickler = TolerantUnpickler if tolerant else PlainUnpickler
    return SimpleNamespace(
        __name__="utils.checkpoint.unpickler",
        Unpickler=unpickler,
        load=lambda file, **options: unpickler(file, **options).load(),
    )

"""Files that try to run code, which would leave a file `executed`, and files with harmless objects."""

import argparse
import contextlib
import io
import os
import pathlib
import pickle
import pickletools
import resource
import runpy
import subprocess
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from utils.checkpoint.unpickler import (
    ALLOWED,
    Call,
    Inert,
    PlainUnpickler,
    RefusedObjectError,
    make_tensor,
    pickle_module,
)
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # what protocol 4 is read for, in some tests

COMMAND = "touch executed"
CODE = "open('executed', 'w')"
Reduction = tuple[Any, ...]


class Attack:
    """Object whose pickle calls a function with arguments."""

    def __init__(self, *reduction: Any) -> None:
        self.reduction = reduction

    def __reduce__(self) -> Reduction:
        return self.reduction


def innocent_tensor() -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3)


def nested_file() -> bytes:
    file = io.BytesIO()
    torch.save(Attack(os.system, (COMMAND,)), file)
    return file.getvalue()


ATTACKS: dict[str, tuple[Attack, str]] = {
    "os.system": (Attack(os.system, (COMMAND,)), r"posix\.system"),
    "eval": (Attack(eval, (CODE,)), r"builtins\.eval"),
    "exec": (Attack(exec, (CODE,)), r"builtins\.exec"),
    "open": (Attack(open, ("executed", "w")), r"_?io\.open"),
    "subprocess": (Attack(subprocess.call, (["touch", "executed"],)), r"subprocess\.call"),
    "runpy": (Attack(runpy.run_path, ("code.py",)), r"runpy\.run_path"),
    "getattr chain": (Attack(getattr, (dict, "get")), r"builtins\.(getattr|dict)"),
    "class with a call as its state": (Attack(OrderedDict, (), {"x": Attack(os.system, (COMMAND,))}), r"posix\.system"),
    "in a list in a set in a dictionary": (
        Attack(OrderedDict, ([("a", [1, {"b": Attack(os.system, (COMMAND,))}])],)),
        r"posix\.system",
    ),
    "torch.load": (Attack(torch.load, ("nested.pth",), {}), r"torch\.serialization\.load"),
    "_load_from_bytes": (Attack(torch.storage._load_from_bytes, (nested_file(),)), r"torch\.storage\._load_from_bytes"),
    "a numpy loader": (Attack(np.load, ("nested.npy",)), r"numpy\.load|numpy\.lib"),
    "a path that writes": (
        Attack(pathlib.Path.touch, (pathlib.Path("executed"),)),
        r"pathlib\.Path(\.touch)?|builtins\.getattr",
    ),
}


def write_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def write_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_protocol_4(content: Any, path: Path) -> None:
    torch.save(content, path, pickle_protocol=4)


def write_bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


WRITERS = [write_zip, write_legacy, write_protocol_4, write_bare_pickle]


def load_or_refuse(path: Path) -> None:
    with contextlib.suppress(CheckpointError):
        load_checkpoint(path, tolerant=True)


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[..., None], tolerant: bool
) -> None:
    """A CfgNode comes first, so that PyTorch's reader refuses the file and ours meets the attack."""
    monkeypatch.chdir(tmp_path)
    Path("nested.pth").write_bytes(nested_file())
    Path("code.py").write_text(CODE)
    attack, shown = ATTACKS[name]
    write({"config": CfgNode({"A": 1}), "model": {"x": attack}}, tmp_path / "bad.pth")
    if tolerant and name == "a path that writes":  # a stand-in, which does nothing when it is called
        load_or_refuse(tmp_path / "bad.pth")
    else:
        with pytest.raises(CheckpointError, match=f"it holds ({shown}), and such objects could run code"):
            load_checkpoint(tmp_path / "bad.pth", tolerant=tolerant)
    assert not Path("executed").exists()


def test_the_attacks_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by plain pickle, the files do run code."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "eval", "in a list in a set in a dictionary"):
        write_zip({"config": CfgNode({"A": 1}), "x": ATTACKS[name][0]}, tmp_path / "bad.pth")
        torch.load(tmp_path / "bad.pth", weights_only=False)
        assert Path("executed").exists()
        Path("executed").unlink()


def with_pickle(path: Path, data: bytes) -> Path:
    """Return a checkpoint in PyTorch's zip format whose pickle is `data`."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, data if name.endswith("data.pkl") else record)
    return path


FORGED = {
    # A class that bears CfgNode's name with os.system as what makes it: c = GLOBAL, R = REDUCE, b = BUILD, . = STOP.
    "CfgNode made by a command": b"cyacs.config\nCfgNode\ncposix\nsystem\n(S'touch executed'\ntR.",
    "CfgNode as a module": b"cyacs.config\nCfgNode.__init__.__globals__\n.",
    "dots lead nowhere": b"\x80\x04cyacs.config\nCfgNode\n\x8c\x0byacs.config\x8c\x11CfgNode.merge_from\x93.",
    "a class altered": b"\x80\x02cyacs.config\nCfgNode\n(N}U\x0b__setitem__cyacs.config\nCfgNode\nstb.",
    "another class altered": b"\x80\x02cargparse\nNamespace\n(N}U\x0b__setitem__cyacs.config\nCfgNode\nstb.",
    "a stand-in's class altered": b"\x80\x02cunknown\nThing\n(N}U\x0b__setitem__cyacs.config\nCfgNode\nstb.",
    "a function altered": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}U\x08functionccollections\nOrderedDict\nstb.",
    "a function's dictionary altered": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x04evilK\x01sb.",
    "INST": b"(S'touch executed'\niposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nS'touch executed'\no.",
    "extension registry": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("name", FORGED)
def test_forged_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tolerant: bool) -> None:
    monkeypatch.chdir(tmp_path)
    classes = [Inert, *(value for value in ALLOWED.values() if isinstance(value, type))]
    before = [repr(vars(value)) for value in classes]
    path = with_pickle(tmp_path / "bad.pth", FORGED[name])
    if tolerant:
        load_or_refuse(path)
    else:
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path)
    assert not Path("executed").exists()
    assert before == [repr(vars(value)) for value in classes]


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
def test_torchscript_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript archives are programs, which torch.load would pass to another reader."""
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: {"model": {}})
    path = tmp_path / "script.pth"
    torch.save({"config": CfgNode({"A": 1})}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


def read_plain(data: bytes) -> Any:
    return PlainUnpickler(io.BytesIO(data)).load()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(("offset", "size"), [(0, (2, 4)), (1, (2, 3)), (-1, (2, 3)), (0, (99, 99))])
def test_tensors_beyond_their_storage_are_refused(offset: int, size: tuple[int, int]) -> None:
    """PyTorch would enlarge the storage by uninitialized memory."""
    storage = torch.storage.TypedStorage(wrap_storage=innocent_tensor().untyped_storage(), dtype=torch.float32)
    assert make_tensor(storage, 0, (2, 3), (3, 1)).equal(innocent_tensor())
    assert make_tensor(storage, 6, (0, 3), (3, 1)).shape == (0, 3)
    with pytest.raises(pickle.UnpicklingError, match="beyond its storage"):
        make_tensor(storage, offset, size, (3, 1))


@pytest.mark.parametrize("write", WRITERS[:3])
def test_harmless_objects_are_read(tmp_path: Path, write: Callable[..., None]) -> None:
    config = CfgNode({"MODEL": {"NAME": "mlla_tiny", "DEPTHS": [2, 4]}, "BETAS": (0.9, 0.999)})
    config.freeze()
    tensor = innocent_tensor()
    content = {
        "model": {
            "transposed": tensor.t(),
            "view": tensor[1],
            "bfloat16": tensor.bfloat16(),
            "parameter": torch.nn.Parameter(tensor),
            "count": torch.tensor(3),
            "empty": torch.zeros(0, 4),
        },
        "config": config,
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(path=pathlib.PurePosixPath("a"), seen={1, 2})),
        "best": np.float64(81.5),
        "is_best": np.bool_(True),
        "counts": np.arange(6, dtype=np.int32).reshape(2, 3),
        "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">u2"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "bytes": b"\x00\xff",
    }
    content["args"].nested.path = pathlib.Path("a/b")
    write(content, tmp_path / "w.pth")
    loaded = load_checkpoint(tmp_path / "w.pth")
    for name, value in content["model"].items():
        assert loaded["model"][name].equal(value)
        assert loaded["model"][name].dtype == value.dtype
    assert loaded["model"]["transposed"].stride() == (1, 3)
    assert loaded["config"] == {"MODEL": {"NAME": "mlla_tiny", "DEPTHS": [2, 4]}, "BETAS": (0.9, 0.999)}
    assert isinstance(loaded["config"]["MODEL"], dict)
    assert not isinstance(loaded["config"], CfgNode)
    assert loaded["args"] == {"lr": 0.1, "nested": {"path": "a/b", "seen": {1, 2}}}
    assert (loaded["best"], loaded["is_best"]) == (81.5, True)
    for name in ("counts", "by columns", "big endian"):
        np.testing.assert_array_equal(loaded[name], content[name])
    assert (loaded["dtype"], loaded["size"], loaded["bytes"]) == (torch.float16, (1, 2), b"\x00\xff")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    for value in (np.array([None, 1], dtype=object), np.zeros(2, dtype=[("a", "f4")])):
        torch.save({"c": CfgNode({"A": 1}), "x": value}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="a NumPy array of type"):
            load_checkpoint(tmp_path / "w.pth")


class History:
    """Object of an unknown package, which OpenMMLab's files have."""

    def __init__(self) -> None:
        self.values = [1.0]
        self.largest = History.most

    @staticmethod
    def most() -> float:
        return 1.0


class Settings(dict[str, int]):
    """Dictionary of an unknown package."""


class Steps(list[int]):
    """List of an unknown package."""


class Slots:
    """Object whose state is not a dictionary."""

    __slots__ = ("value",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_unknown_objects_are_skipped_if_tolerant(tmp_path: Path, protocol: int) -> None:
    weights = OrderedDict(a=innocent_tensor())
    meta = {"epoch": 3, "history": History(), "cfg": Settings(x=1), "steps": Steps([1, 2]), "losses": deque([0.5])}
    content = {"meta": {**meta, "slots": Slots()}, "state_dict": weights}
    content["meta"]["slots"].value = 1
    torch.save(content, tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"it holds \S*test_unpickler\.(History|Settings), and such objects"):
        load_checkpoint(tmp_path / "w.pth")
    loaded = load_checkpoint(tmp_path / "w.pth", tolerant=True)
    assert loaded["state_dict"]["a"].equal(weights["a"])
    assert loaded["meta"]["epoch"] == 3
    assert not isinstance(loaded["meta"]["history"], History)
    assert not hasattr(loaded["meta"]["history"], "values")


def test_the_table_has_only_sealed_callables() -> None:
    for name, value in ALLOWED.items():
        assert isinstance(value, str | torch.dtype | Call) or issubclass(value, dict), name
        assert not isinstance(value, type) or "__setstate__" in vars(value), name  # else BUILD could alter the class


def test_refusal_names_the_object() -> None:
    with pytest.raises(RefusedObjectError, match=r"posix.system is not plain data") as caught:
        read_plain(pickle.dumps(Attack(os.system, (COMMAND,))))
    assert caught.value.name == "posix.system"
    assert pickle_module(tolerant=False).Unpickler is PlainUnpickler


def test_forged_pickles_are_what_they_claim() -> None:
    for name, data in FORGED.items():
        if name != "dots lead nowhere":
            assert list(pickletools.genops(data)), name


def test_a_large_memo_index_takes_no_memory(tmp_path: Path) -> None:
    """One instruction in which a pickle names the place of its last object, of up to 2^32."""
    torch.save({"config": CfgNode({"A": 1}), "model": {"a": torch.zeros(1)}}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as source,
        zipfile.ZipFile(tmp_path / "v.pth", "w") as target,
    ):
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content = content[:-1] + pickle.LONG_BINPUT + (2**32 - 1).to_bytes(4, "little") + pickle.STOP
            target.writestr(name, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_checkpoint(tmp_path / "v.pth")["config"] == {"A": 1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB

"""Checkpoints and weights files of every kind, read without running code from them."""

import json
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from utils.checkpoint.download import local_file
from utils.checkpoint.unpickler import RefusedObjectError, pickle_module


class CheckpointError(ValueError):
    """A weights file that is missing, cannot be read, or does not fit: one line with the path, cause and remedy."""


UNSAFE = re.compile(r"Unsupported (?:global: GLOBAL|class) (\S+)")
NO_WEIGHTS = {  # how files begin that were saved in place of weights
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<!doctype html": "a web page, saved in place of the file; download it again",
    b"<html": "a web page, saved in place of the file; download it again",
}


def load_checkpoint(source: str | Path, *, tolerant: bool = False) -> dict[str, Any]:
    """Read a checkpoint or a weights file to the CPU; nothing in it is executed.

    Args:
        source: a path, a URL, or the name of released weights; see `utils.checkpoint.download.local_file`.
        tolerant: put inert stand-ins in the place of unknown objects that the file holds beside its weights; without
            it the file is refused. Configurations of yacs and argparse are read as dictionaries in either case.

    Returns:
        The file's content; of a .safetensors file the tensors under `model`, and `classes` and `config` if it has them.

    Raises:
        CheckpointError: no such file, a folder, or not a file that can be read safely.
        DownloadError: a URL's file cannot be had.
    """
    path = local_file(source)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    with path.open("rb") as file:
        beginning = file.read(32)
        file.seek(0)
        for sign, meaning in NO_WEIGHTS.items():
            if beginning.lower().startswith(sign):
                raise CheckpointError(f"{path}: is {meaning}")
        if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") < 10**9:
            return read_safetensors(path)
        content = read_pickled(path, file, tolerant=tolerant)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not weights by name")
    return content


def read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            facts = file.metadata() or {}
            content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        if "classes" in facts:
            content["classes"] = json.loads(facts["classes"])
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a safetensors file: {error}") from error
    return {**content, **({"config": facts["config"]} if "config" in facts else {})}


def read_pickled(path: Path, file: BinaryIO, *, tolerant: bool) -> Any:
    """What torch.save wrote: by PyTorch's own safe reader, and if that meets an unknown class by ours."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Only here: archives that torch.load would hand to other readers (TorchScript, tar) fail in other ways.
        first_error: Exception = error
    except Exception as error:  # torch.load raises many kinds for a file that is not its own, or is cut short
        raise unreadable(path, error) from error
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=pickle_module(tolerant=tolerant))
    except Exception as error:
        raise unreadable(path, error if isinstance(error, RefusedObjectError) else first_error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = "damaged, or not its format"
    found = UNSAFE.search(str(error))
    if name := error.name if isinstance(error, RefusedObjectError) else found and found[1]:
        reason = f"it holds {name}, and such objects could run code"
    return CheckpointError(f"{path}: cannot be read as a PyTorch weights file: {reason}")

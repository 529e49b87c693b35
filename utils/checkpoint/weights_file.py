"""Reading checkpoints and weights files of every format, without running code from them."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.checkpoint.download import local_file
from utils.checkpoint.plain_content import ContentError, plain_content
from utils.checkpoint.unpickler import RefusedObjectError, pickle_module
from utils.config.errors import UserError


class CheckpointError(UserError):
    """A weights file is missing, cannot be read, or does not fit the model: names file, cause and remedy."""


NO_WEIGHTS = {  # first bytes of files that were saved in place of weights
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<!doctype html": "a web page, saved in place of the file; download it again",
    b"<html": "a web page, saved in place of the file; download it again",
}


def load_checkpoint(source: str | Path, *, tolerant: bool = False) -> dict[str, Any]:
    """Read a checkpoint or a weights file to the CPU, without executing anything in it.

    Args:
        source: a path, a URL, or the name of released weights; see `utils.checkpoint.download.local_file`.
        tolerant: replace unknown objects beside the weights by inert stand-ins; without it the file is refused. A yacs
            CfgNode or an argparse.Namespace is read as a dictionary in either case.

    Returns:
        The file's content; from a safetensors file the tensors under `model`, with its `classes` and `config` if any.

    Raises:
        CheckpointError: the file does not exist, or cannot be read safely.
        DownloadError: the file of a URL cannot be downloaded.
    """
    path = local_file(source)
    try:
        with path.open("rb") as file:
            content = read_any(path, file, tolerant=tolerant)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: no such checkpoint file") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: is a folder; name a checkpoint file in it") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not weights by name")
    try:
        return dict(plain_content(content))
    except ContentError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_any(path: Path, file: BinaryIO, *, tolerant: bool) -> Any:
    """Read a file of any format; the format is told by its first bytes, not by its name."""
    start = file.read(32)
    file.seek(0)
    for sign, meaning in NO_WEIGHTS.items():
        if start.lower().startswith(sign):
            raise CheckpointError(f"{path}: is {meaning}")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 10**9:
        return read_safetensors(path)
    return read_pickled(path, file, tolerant=tolerant)


def read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        if "classes" in metadata:
            content["classes"] = json.loads(metadata["classes"])
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a safetensors file: {error}") from error
    return {**content, **({"config": metadata["config"]} if "config" in metadata else {})}


def write_safetensors(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights as a safetensors file, with metadata such as `classes` and `config` in its header.

    Text is stored as it is, other values as JSON; None is left out.
    """
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items() if v is not None}
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, path, {"format": "pt", **texts})


def read_pickled(path: Path, file: BinaryIO, *, tolerant: bool) -> Any:
    """Read a file of torch.save: with PyTorch's own safe reader, or, if that meets an unknown class, with ours."""
    reason = "damaged, or not its format"
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # TorchScript and tar archives, which are not for our reader, raise other errors
            file.seek(0)
            pickles = pickle_module(tolerant=tolerant)
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=pickles)
    except Exception as error:  # torch.load raises many kinds for damaged files
        if isinstance(error, RefusedObjectError):
            reason = f"it holds {error.name}, and such objects could run code"
        raise CheckpointError(f"{path}: cannot be read as a PyTorch weights file: {reason}") from error

"""Reading checkpoints and weights files of every format, without running code from them."""

import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.checkpoint.download import cache_folder, local_file, nearest_released_name
from utils.checkpoint.plain_content import ContentError, plain_content
from utils.checkpoint.unpickler import RefusedObjectError, pickle_module
from utils.config.errors import UserError


class CheckpointError(UserError):
    """A weights file is missing, cannot be read, or does not fit the model: names file, cause and remedy."""


ZIP_SIGN = b"PK\x03\x04"
CHUNK_BYTES = 1 << 20
CHECKSUM_KEY = "crc32"  # in the metadata of a safetensors file
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
    path = local_file(source, check=read_tolerantly)
    try:
        return read_file(path, tolerant=tolerant)
    except CheckpointError:
        if path.parent != cache_folder():
            raise
    # If it is damaged, it is downloaded again; if not, this fails again.
    return read_file(local_file(source, check=read_tolerantly, is_suspect=True), tolerant=tolerant)


def read_tolerantly(path: Path) -> None:
    """Read a file that was downloaded, to see whether it can be read at all."""
    read_file(path, tolerant=True)


def read_file(path: Path, *, tolerant: bool) -> dict[str, Any]:
    """Read a local file; see `load_checkpoint`."""
    try:
        with path.open("rb") as file:
            content = read_any(path, file, tolerant=tolerant)
    except (FileNotFoundError, NotADirectoryError) as error:
        near = nearest_released_name(str(path))
        hint = f"; did you mean {near}, the released weights?" if near else ""
        raise CheckpointError(f"{path}: no such checkpoint file{hint}") from error
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
    is_zip = start.startswith(ZIP_SIGN)
    if is_zip:
        check_records(path, file)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 10**9:
        return read_safetensors(path)
    return read_pickled(path, file, tolerant=tolerant, is_zip=is_zip)


def check_records(path: Path, file: BinaryIO) -> None:
    """Compare the records of a zip archive with their CRC-32s, which torch.save writes and torch.load does not check.

    Records without a CRC-32, of torch.serialization.set_crc32_options(False), are not compared.

    Raises:
        CheckpointError: a record differs, or is compressed, which torch.save never does.
    """
    record = "its list of records"
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                record = info.filename
                if info.compress_type != zipfile.ZIP_STORED:  # or a small file could fill the memory
                    raise CheckpointError(f"{path}: {record} is compressed, as torch.save writes none")
                if info.CRC:
                    with archive.open(info) as content:
                        while content.read(CHUNK_BYTES):
                            pass
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is damaged: {record} does not have its checksum, or is cut short") from error
    file.seek(0)


def read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content: dict[str, Any] = {"model": weights}
        if metadata.get(CHECKSUM_KEY, "") not in ("", content_checksum(weights, metadata)):
            raise CheckpointError(f"{path}: is damaged: its content does not have its checksum")
        if "classes" in metadata:
            content["classes"] = json.loads(metadata["classes"])
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as a safetensors file: {error}") from error
    return {**content, **({"config": metadata["config"]} if "config" in metadata else {})}


def write_safetensors(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights as a safetensors file, with metadata such as `classes` and `config` in its header.

    Text is stored as it is, other values as JSON; None is left out. A checksum of all is stored with them.
    """
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items() if v is not None}
    tensors = {name: value.contiguous().clone() for name, value in weights.items()}
    texts = {"format": "pt", **texts}
    save_file(tensors, path, {**texts, CHECKSUM_KEY: content_checksum(tensors, texts)})


def content_checksum(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the CRC-32, in hexadecimal digits, of a safetensors file's tensors and of its other metadata."""
    checksum = zlib.crc32(json.dumps(sorted((k, v) for k, v in metadata.items() if k != CHECKSUM_KEY)).encode())
    for name, value in sorted(weights.items()):
        checksum = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def read_pickled(path: Path, file: BinaryIO, *, tolerant: bool, is_zip: bool) -> Any:
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
            # The checksums of a zip archive have been compared, the older format has none.
            damage = "" if is_zip else ", or the file is damaged"
            reason = f"it holds {error.name}, and such objects could run code{damage}"
        raise CheckpointError(f"{path}: cannot be read as a PyTorch weights file: {reason}") from error

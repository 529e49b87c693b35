"""ImageNet in zip archives, in the official layout: train.zip and val.zip with train_map.txt and val_map.txt.

A line of a map is `class/image.jpg<TAB>label`.
"""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import BrokenImageError, DataError, as_data_error
from data.sources.labels import check_label, read_lines
from data.sources.shared_cache import SharedCache, available_bytes, machine
from data.sources.string_table import StringTable
from utils.config.errors import MissingFileError

LOCAL_HEADER_BYTES = 30
MISSING = -1
MAX_LABEL_LENGTH = 100  # characters; Python refuses to read very long numbers
MAX_IMAGE_BYTES = 2**30


class ZipFolder:
    """Images of one split as encoded bytes, from <split>.zip with the labels of <split>_map.txt.

    The archive's directory is read once, into arrays; each process opens the archive itself.

    Args:
        root: folder with the archive and the map.
        split: "train" or "val".
        archive: path of the archive, if it is not <root>/<split>.zip.

    Raises:
        MissingFileError: the archive or the map is missing.
        DataError: the map or the archive is damaged, or they do not match.
    """

    def __init__(self, root: str, split: str, archive: Path | None = None) -> None:
        self.archive = archive or required_file(root, f"{split}.zip")
        paths, self.labels = read_map(required_file(root, f"{split}_map.txt"))
        self.paths = StringTable(paths)
        self.classes = class_names(root)
        self.headers, self.sizes, self.stored_sizes, self.checksums = find_members(self.archive, paths)
        self.cache: SharedCache | None = None
        self.first, self.step = 0, 1  # the cache holds images first, first + step, ...
        self.descriptor, self.owner = -1, -1

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.archive}: {self.paths[index]}"

    def bytes_of(self, first: int, step: int) -> int:
        """Return the total size in bytes of images first, first + step, first + 2 * step, ..."""
        return int(self.sizes[first::step].sum())

    def use_cache(self, first: int, step: int) -> SharedCache:
        """Keep images first, first + step, ... in memory after their first read; return the cache."""
        self.first, self.step = first, step
        self.cache = SharedCache(self.sizes[first::step])
        return self.cache

    def read(self, index: int) -> bytes:
        if self.cache is None or index % self.step != self.first:
            return self.read_archive(index)
        slot = index // self.step
        data = self.cache.get(slot)
        if data is None:
            data = self.read_archive(index)
            self.cache.put(slot, data)
        return data

    def read_archive(self, index: int) -> bytes:
        """Read an image from the archive and verify its checksum.

        Raises:
            BrokenImageError: it is missing or damaged.
        """
        if self.headers[index] == MISSING:
            raise BrokenImageError("not in the archive, though the map names it")
        try:
            descriptor = self.open_archive()
            header = os.pread(descriptor, LOCAL_HEADER_BYTES, self.headers[index])
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            stored = os.pread(descriptor, self.stored_sizes[index], self.headers[index] + LOCAL_HEADER_BYTES + lengths)
            is_deflated = header[8:10] == b"\x08\x00"
            if is_deflated:  # to one byte more than listed at most
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, int(self.sizes[index]) + 1)
            else:
                data = stored
        except (OSError, zlib.error) as error:
            raise BrokenImageError(f"cannot be read: {error}") from error
        if len(data) != self.sizes[index] or zlib.crc32(data) != self.checksums[index]:
            raise BrokenImageError("damaged in the archive: its size or checksum differs from the listed one")
        return data

    def open_archive(self) -> int:
        """Return this process's own file descriptor, which forked and spawned processes do not share."""
        if self.owner != os.getpid():
            self.descriptor, self.owner = os.open(self.archive, os.O_RDONLY), os.getpid()
        return self.descriptor

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"descriptor": -1, "owner": -1}


def required_file(root: str, name: str) -> Path:
    path = Path(root) / name
    with as_data_error(path):
        exists = bool(root) and path.is_file()
    if not exists:
        raise MissingFileError(
            f"DATA.DATA_PATH {root!r}: no {name} in it; --zip reads train.zip, val.zip, train_map.txt and val_map.txt, "
            "which python -m data.make_zip makes"
        )
    return path


def read_map(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the names and labels (N,) of a map.

    Raises:
        DataError: a line is not `name<TAB>label`, or there are no lines.
    """
    paths, labels = [], []
    for number, line in enumerate(read_lines(path), 1):
        name, _, label = line.rpartition("\t")
        if not line.strip():
            continue
        if not name or not label.strip().isdecimal() or len(label) > MAX_LABEL_LENGTH:
            raise DataError(f"{path}, line {number}: {line!r} is not `class/image.jpg<TAB>label`")
        paths.append(name)
        labels.append(check_label(int(label), f"{path}, line {number}"))
    if not paths:
        raise DataError(f"{path}: it names no images")
    return paths, np.array(labels, dtype=np.int32)


def class_names(root: str) -> list[str]:
    """Return class names by label: the folders in the maps, or the label itself where a map has no folders."""
    names: dict[int, set[str]] = {}
    for split in ("val", "train"):
        if (path := Path(root) / f"{split}_map.txt").is_file():
            for name, label in zip(*read_map(path), strict=True):
                names.setdefault(int(label), set()).update({name.split("/")[0]} if "/" in name else ())
    return [
        names[label].pop() if len(names.get(label, ())) == 1 else str(label)
        for label in range(max(names, default=-1) + 1)
    ]


def find_members(archive: Path, paths: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Locate the named images; names in the archive may start with the split's folder.

    Returns:
        Offsets of the headers in bytes (MISSING for images that are not in the archive), sizes and stored sizes in
        bytes, and checksums, each (N,).

    Raises:
        DataError: the archive is damaged, holds none of the images, or stores some in an unsupported form.
    """
    try:
        with as_data_error(archive), zipfile.ZipFile(archive) as opened:
            archive_bytes = archive.stat().st_size
            members = {info.filename: info for info in opened.infolist()}
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive}: not a complete zip archive ({error}); make it again") from error
    prefix = next((p for p in ("", f"{archive.stem}/") if any(p + path in members for path in paths)), None)
    if prefix is None:
        raise DataError(f"{archive}: none of the images that {archive.stem}_map.txt names is in it, such as {paths[0]}")
    headers = np.full(len(paths), MISSING, dtype=np.int64)
    sizes, stored_sizes, checksums = (np.zeros(len(paths), dtype=np.int64) for _ in range(3))
    for index, path in enumerate(paths):
        if (info := members.get(prefix + path)) is None:
            continue
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise DataError(
                f"{archive}: {path} is encrypted or of an unsupported compression; python -m data.make_zip uses none"
            )
        if info.file_size > MAX_IMAGE_BYTES or info.header_offset + info.compress_size > archive_bytes:
            raise DataError(
                f"{archive}: {path} has an impossible size, {info.file_size} bytes ({info.compress_size} stored); "
                f"images have up to {MAX_IMAGE_BYTES} bytes"
            )
        headers[index], sizes[index] = info.header_offset, info.file_size
        stored_sizes[index], checksums[index] = info.compress_size, info.CRC
    return headers, sizes, stored_sizes, checksums


def cache_archives(archives: list[ZipFolder], mode: str, rank: int, num_processes: int) -> None:
    """Give each archive a cache of this process's shard ("part"), or of all images, shared on the machine ("full").

    Raises:
        DataError: the machine does not have enough memory.
    """
    first, step = (rank, num_processes) if mode == "part" else (0, 1)
    needed = sum(archive.bytes_of(first, step) for archive in archives)
    if mode == "part":
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine, set by the launcher
    if needed > (available := available_bytes()):
        raise DataError(
            f"DATA.CACHE_MODE {mode!r}: the images need {needed / 2**30:.1f} GiB of this machine's memory, "
            f"{available / 2**30:.1f} GiB are available; set --cache-mode {'no' if mode == 'part' else 'part, or no'}"
        )
    caches = [archive.use_cache(first, step) for archive in archives]
    if mode == "full" and num_processes > 1:
        share_on_machine(caches, num_processes)


def share_on_machine(caches: list[SharedCache], num_processes: int) -> None:
    """Make the processes of each machine use the caches of the first process there."""
    own = (machine(), [cache.address for cache in caches])
    gathered: list[Any] = [None] * num_processes
    torch.distributed.all_gather_object(gathered, own)
    addresses = next(addresses for host, addresses in gathered if host == own[0])
    for cache, address in zip(caches, addresses, strict=True):
        if address.pid != os.getpid():
            cache.join(address)
    torch.distributed.barrier()  # no process may exit before all have joined

"""WebDataset shards on a local disk: tar files in which a sample is `key.jpg` with `key.cls` or `key.json`.

The shards are indexed when they are opened, so that images can be read in any order. timm's reader streams them, and
each worker shuffles its own stream: neither the order nor a resumed epoch would be reproducible, and processes with
uneven shards would evaluate some images twice or not at all.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from data.errors import BrokenImageError, DataError, as_data_error
from data.sources.labels import check_label, class_names
from data.sources.string_table import StringTable
from utils.config.errors import MissingFileError

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm")
SPLITS = {"train": ("train",), "val": ("val", "validation")}


class Sample(NamedTuple):
    """Byte range of an image in its shard, and its label."""

    key: str
    start: int
    size: int
    label: int


class WebDatasetShards:
    """Images of one split as encoded bytes. Classes are named by the lines of classes.txt in `folder`, or by numbers.

    Args:
        folder: folder with `<split>/*.tar` or `*<split>*.tar`; val may be called validation.
        split: "train" or "val".

    Raises:
        MissingFileError: there are no shards.
        DataError: a shard cannot be read, or has an image without a label.
    """

    def __init__(self, folder: str, split: str) -> None:
        self.shards = find_shards(Path(folder), split)
        samples = [(number, sample) for number, shard in enumerate(self.shards) for sample in read_shard(shard)]
        if not samples:
            raise MissingFileError(f"{self.shards[0]}: no images ({', '.join(IMAGES)}) in it, nor in other shards")
        self.numbers = np.array([number for number, _ in samples], dtype=np.int32)
        self.starts = np.array([sample.start for _, sample in samples], dtype=np.int64)
        self.sizes = np.array([sample.size for _, sample in samples], dtype=np.int64)
        self.labels = np.array([sample.label for _, sample in samples], dtype=np.int32)
        self.keys = StringTable(sample.key for _, sample in samples)
        self.classes = class_names(Path(folder), int(self.labels.max()) + 1)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.shards[self.numbers[index]]}: {self.keys[index]}"

    def read(self, index: int) -> bytes:
        try:
            with self.shards[self.numbers[index]].open("rb", buffering=0) as shard:
                return os.pread(shard.fileno(), self.sizes[index], self.starts[index])
        except OSError as error:
            raise BrokenImageError(f"cannot be read: {error.strerror}") from error


def find_shards(folder: Path, split: str) -> list[Path]:
    for name in SPLITS[split]:
        with as_data_error(folder):
            found = sorted(folder.glob(f"{name}/*.tar")) or sorted(folder.glob(f"*{name}*.tar"))
            shards = [path for path in found if path.is_file()]
        if shards:
            return shards
    raise MissingFileError(
        f"DATA.DATASET wds/: no shards {folder}/{split}/*.tar or {folder}/*{split}*.tar; they must be "
        "uncompressed and on a local disk"
    )


def read_shard(shard: Path) -> Iterator[Sample]:
    """Yield the samples of a shard. The files of a sample are adjacent, in any order."""
    try:
        with as_data_error(shard), tarfile.open(shard, "r:") as archive:
            key, image, label = "", None, None
            shard_bytes = shard.stat().st_size
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > shard_bytes:
                    raise tarfile.ReadError(f"{member.name} of {member.size} bytes is cut off")
                stem, _, extension = Path(member.name).name.partition(".")
                member_key = f"{Path(member.name).parent}/{stem}".removeprefix("./")
                if member_key != key:
                    yield from complete_sample(shard, key, image, label)
                    key, image, label = member_key, None, None
                if extension.lower() in IMAGES:
                    image = member.offset_data, member.size
                elif extension in ("cls", "json"):
                    label = read_label(shard, member.name, archive.extractfile(member), label)
            yield from complete_sample(shard, key, image, label)
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{shard}: not a complete, uncompressed tar file ({error})") from error


def read_label(shard: Path, name: str, content: IO[bytes] | None, previous: int | None) -> int | None:
    """Return the label in a .cls or .json file; for a .json without one, the `previous` label of the sample."""
    assert content is not None
    try:
        if name.endswith(".cls"):
            return int(content.read())
        label = json.load(content)["label"]
        if isinstance(label, float) and not label.is_integer():
            raise ValueError(f"{label} is no whole number")
        return int(label)
    except KeyError:
        return previous
    except (TypeError, ValueError) as error:
        raise DataError(f"{shard}: {name} holds no label ({error})") from error


def complete_sample(shard: Path, key: str, image: tuple[int, int] | None, label: int | None) -> Iterator[Sample]:
    """Yield the sample of a key, or nothing if the key has no image."""
    if image is not None:
        if label is None:
            raise DataError(f"{shard}: {key} has no label; it needs {key}.cls, or {key}.json with a label")
        yield Sample(key, *image, check_label(label, f"{shard}: {key}"))

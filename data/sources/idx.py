"""MNIST's file format, IDX, in memory: MNIST, Fashion-MNIST, KMNIST, EMNIST; files as published or unpacked."""

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError, as_data_error
from data.sources.labels import CLASS_FILE, class_names, read_lines
from data.sources.shared_cache import available_bytes
from utils.config.errors import MissingFileError

DIMENSIONS = {"images": 3, "labels": 1}
SPLITS = {"train": ("train",), "val": ("t10k", "test")}
UNSIGNED_BYTES = 0x08  # code of the type of the elements, the only one that images and labels have
CHUNK_BYTES = 1 << 20
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
FASHION_CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


class IdxImages:
    """Gray images of one split, as RGB.

    Classes are named by classes.txt beside the files, by EMNIST's mapping file, as Fashion-MNIST's if the folder or the
    one above has "fashion" in its name, or else by their numbers. EMNIST's images, which are stored transposed, are
    turned upright.

    Args:
        path: folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same with `t10k` or `test`, each
            perhaps with .gz; where their names start with more, as `emnist-letters-train-...`, a folder that holds one
            such set, or `<folder>/emnist-letters`.
        split: "train" or "val".

    Raises:
        MissingFileError: there are no such files, or several sets.
        DataError: a file is damaged or too large for the memory, or images and labels do not match.
    """

    def __init__(self, path: str, split: str) -> None:
        self.path, label_path = (find_file(Path(path), split, kind) for kind in DIMENSIONS)
        images = read_idx(self.path, DIMENSIONS["images"])  # (N, H, W)
        labels = read_idx(label_path, DIMENSIONS["labels"])  # (N,)
        if len(images) != len(labels):
            raise DataError(f"{self.path}: {len(images)} images, but {label_path.name} has {len(labels)} labels")
        if self.path.name.startswith("emnist"):
            images = images.swapaxes(1, 2)
        self.images = torch.from_numpy(images)[..., None].expand(-1, -1, -1, 3)  # (N, H, W, 3), gray values once
        self.classes, self.labels = name_classes(self.path, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def read(self, index: int) -> Tensor:
        return self.images[index]


def find_file(path: Path, split: str, kind: str) -> Path:
    """Return the file of a split, such as t10k-images-idx3-ubyte for kind images, or with .gz; unpacked wins."""
    with as_data_error(path):
        folder, prefix = (path, "") if path.is_dir() else (path.parent, f"{path.name}-")
        names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    pattern = rf"{re.escape(prefix)}(.*-)?({'|'.join(SPLITS[split])})-{kind}[-.]idx\d-ubyte(\.gz)?"
    found = {match[1] or "": name for name in reversed(names) if (match := re.fullmatch(pattern, name))}
    if not found:
        wanted = f"{SPLITS[split][0]}-{kind}-idx{DIMENSIONS[kind]}-ubyte"
        raise MissingFileError(
            f"{path}: no {wanted} or {wanted}.gz; DATA.DATASET idx needs images and labels of both splits. "
            "Fashion-MNIST: apt-get install dataset-fashion-mnist, or name the folder with --data-path"
        )
    if len(found) > 1 and "" not in found:
        one = folder / f"{prefix}{min(found)}".removesuffix("-")
        raise MissingFileError(
            f"{path}: several datasets: {', '.join(sorted(found.values()))}; name one, such as idx/{one}"
        )
    return folder / found.get("", next(iter(found.values())))


def read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """Return the bytes of a file with `num_dimensions` dimensions.

    No more than the header announces is read, and that is checked against the available memory.

    Raises:
        DataError: the file cannot be read, is no such file, is cut off or too long, or exceeds the memory.
    """
    try:
        with as_data_error(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * num_dimensions)
            if header[:4] != bytes([0, 0, UNSIGNED_BYTES, num_dimensions]) or len(header) < 4 + 4 * num_dimensions:
                raise DataError(
                    f"{path}: no IDX file of bytes in {num_dimensions} dimensions: it starts with {header[:4]!r}"
                )
            shape = np.frombuffer(header, ">u4", offset=4).tolist()
            return np.frombuffer(read_exactly(file, math.prod(shape), path), np.uint8).reshape(shape)
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error}); get it again") from error


def read_exactly(file: BinaryIO | gzip.GzipFile, size: int, path: Path) -> bytearray:
    """Return the rest of a file, `size` bytes.

    Raises:
        DataError: it has more or fewer, or more than the available memory.
    """
    available = available_bytes()
    if not 0 < size <= available:
        raise DataError(f"{path}: its header announces {size} bytes; {available} bytes of memory are available")
    content = bytearray()
    while chunk := file.read(min(CHUNK_BYTES, size + 1 - len(content))):
        content += chunk
    if len(content) != size:
        more = "more" if len(content) > size else f"only {len(content)}"
        raise DataError(f"{path}: its header announces {size} bytes, but there are {more}; get it again")
    return content


def name_classes(images: Path, labels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return class names and the labels (N,), int32, that count them.

    Raises:
        DataError: classes.txt or the mapping lacks a label, or the mapping cannot be read.
    """
    folder, count = images.parent, int(labels.max()) + 1
    mapping = folder / f"{images.name.partition('-train')[0].partition('-test')[0]}-mapping.txt"
    if not (folder / CLASS_FILE).is_file():
        if mapping.is_file():
            return apply_mapping(mapping, labels)
        is_fashion = any("fashion" in name.lower() for name in (folder.name, folder.absolute().parent.name))
        if is_fashion and count <= len(FASHION_CLASSES):
            return list(FASHION_CLASSES), labels.astype(np.int32)
    return class_names(folder, count), labels.astype(np.int32)


def apply_mapping(path: Path, labels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Name the labels by a file with lines `label code ...`, codes of characters; the classes are its labels in order.

    EMNIST's letters have labels from 1 on, and a code for upper and for lower case.
    """
    try:
        rows = {int(label): codes for label, *codes in map(str.split, filter(str.strip, read_lines(path)))}
        names = ["/".join(chr(int(code)) for code in rows[label]) or str(label) for label in sorted(rows)]
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}: not lines of a label and codes of characters ({error})") from error
    known = np.array(sorted(rows), dtype=np.int64)
    if len(unknown := np.setdiff1d(labels, known)):
        raise DataError(f"{path}: it does not name label {unknown[0]}")
    return names, np.searchsorted(known, labels).astype(np.int32)

"""Datasets of Hugging Face's `datasets` library, from a local folder or by name, through timm's reader."""

from pathlib import Path

import numpy as np
from timm.data import create_dataset

from data.errors import BrokenImageError, DataError

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "test")}


class HuggingFaceImages:
    """Images of one split as encoded bytes. The columns are `image` and `label`, a ClassLabel.

    Args:
        name: a folder that `datasets.load_dataset` reads, for example with Parquet files or folders of images, or the
            name of a dataset to download.
        root: folder that a relative `name` starts at, and the cache for downloads. Empty: the library's own cache.
        split: "train" or "val".

    Raises:
        DataError: the library is not installed, or there is no such dataset, split or column.
    """

    def __init__(self, name: str, root: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"DATA.DATASET hfds/{name}: the library `datasets` is not installed; pip install datasets"
            ) from error
        local = Path(root) / name
        try:
            self.path, cache = (str(local), None) if local.is_dir() else (name, root or None)
            names = datasets.get_dataset_split_names(self.path)
            available = next((candidate for candidate in SPLITS[split] if candidate in names), None)
            if available is None:
                raise ValueError(f"no split {' or '.join(SPLITS[split])}, only {', '.join(names)}")
            self.split = available
            self.reader = create_dataset(f"hfds/{self.path}", root=cache, split=available).reader
            labels = list(self.reader.dataset[self.reader.label_key])
        except KeyError as error:
            raise DataError(f"DATA.DATASET hfds/{name}: it has no column {error}; image and label are read") from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"DATA.DATASET hfds/{name}: {' '.join(str(error).split())}") from error
        self.classes = [key for key, _ in sorted(self.reader.class_to_idx.items(), key=lambda item: item[1])]
        if not self.classes:
            raise DataError(f"DATA.DATASET hfds/{name}: the column label must be a ClassLabel")
        if unknown := [i for i, label in enumerate(labels) if label is None or label < 0]:
            raise DataError(
                f"DATA.DATASET hfds/{name}: label must be known for each image; {len(unknown)} of {len(labels)} rows "
                f"of {self.split} have none, the first is row {unknown[0]}"
            )
        self.labels = np.array(labels, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.path}: image {index} of {self.split}"

    def read(self, index: int) -> bytes:
        try:
            file, _ = self.reader[index]
            with file:
                return file.read()
        except (OSError, AssertionError, TypeError) as error:  # timm asserts that there is an image
            raise BrokenImageError("cannot be read: no image in its row, or no file at its path") from error

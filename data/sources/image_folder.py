"""ImageNet-style folders: a folder per class under train/ and val/."""

from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from data.errors import BrokenImageError, as_data_error
from data.sources.string_table import StringTable
from utils.config.errors import MissingFileError


class ImageFolder:
    """Images of one split as encoded bytes. Classes are the sorted folder names; symbolic links are followed.

    Args:
        root: folder with the folder `split`, which has a folder per class; images may lie deeper.
        split: "train" or "val".

    Raises:
        MissingFileError: the folder, its split, or images in a class are missing.
    """

    def __init__(self, root: str, split: str) -> None:
        self.folder = split_folder(root, split)
        with as_data_error(self.folder):
            self.classes = sorted(entry.name for entry in self.folder.iterdir() if entry.is_dir())
        if not self.classes:
            raise MissingFileError(
                f"{self.folder}: no class folders in it; put the images of each class in a folder of its own"
            )
        indices = {name: label for label, name in enumerate(self.classes)}
        samples = make_dataset(self.folder, indices, extensions=IMG_EXTENSIONS, allow_empty=True)
        self.labels = np.array([label for _, label in samples], dtype=np.int32)
        counts = np.bincount(self.labels, minlength=len(self.classes))
        if not counts.all():
            empty = self.folder / self.classes[int(counts.argmin())]
            raise MissingFileError(
                f"{empty}: a class folder without images ({', '.join(IMG_EXTENSIONS)}); add some or remove the folder"
            )
        self.paths = StringTable(path[len(str(self.folder)) + 1 :] for path, _ in samples)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.folder}/{self.paths[index]}"

    def read(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb", buffering=0) as file:  # noqa: PTH123, pathlib takes as long as the read itself
                return file.read()
        except OSError as error:
            raise BrokenImageError(f"cannot be read: {error.strerror}") from error


def split_folder(root: str, split: str) -> Path:
    """Return <root>/<split>.

    Raises:
        MissingFileError: it is not a folder.
    """
    if not root:
        raise MissingFileError("DATA.DATA_PATH is empty: name the folder that holds train/ and val/ with --data-path")
    folder = Path(root) / split
    with as_data_error(folder):
        exists = folder.is_dir()
    if not exists:
        raise MissingFileError(
            f"DATA.DATA_PATH {root!r}: no folder {folder}; it must hold train/ and val/, each with a folder per class"
        )
    return folder

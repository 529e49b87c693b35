"""ImageNet-style folders: a folder per class under train/ and val/."""

import logging
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.errors import BrokenImageError, as_data_error
from data.sources.file_tree import find_files
from data.sources.string_table import StringTable
from utils.config.errors import MissingFileError

logger = logging.getLogger("mlla.data")


class ImageFolder:
    """Images of one split as encoded bytes. Classes are the sorted folder names; symbolic links are followed.

    A warning says how many files and folders were left out, by kind: see `find_files`.

    Args:
        root: folder with the folder `split`, which has a folder per class; images may lie deeper.
        split: "train" or "val".

    Raises:
        MissingFileError: the folder, its split, or images in a class are missing.
    """

    def __init__(self, root: str, split: str) -> None:
        self.folder = split_folder(root, split)
        with as_data_error(self.folder):
            tree = find_files(self.folder, IMG_EXTENSIONS)
        paths = [path for path in tree.paths if "/" in path]
        for path in (path for path in tree.paths if "/" not in path):
            tree.leave_out("images outside the class folders", path)
        if lost := [path for path in tree.dangling if "/" not in path]:
            raise MissingFileError(f"{self.folder}/{lost[0]}: a link that leads nowhere; mend or remove it")
        self.classes = [folder for folder in tree.folders if folder and "/" not in folder]
        if not self.classes:
            raise MissingFileError(
                f"{self.folder}: no class folders in it; put the images of each class in a folder of its own"
            )
        indices = {name: label for label, name in enumerate(self.classes)}
        labels = np.array([indices[path.partition("/")[0]] for path in paths], dtype=np.int32)
        counts = np.bincount(labels, minlength=len(self.classes))
        if not counts.all():
            empty = self.folder / self.classes[int(counts.argmin())]
            raise MissingFileError(
                f"{empty}: a class folder without images ({', '.join(IMG_EXTENSIONS)}); add some or remove the folder"
            )
        order = np.argsort(labels, kind="stable")  # by class, then by folder: "a/deep" before "a-b"
        self.labels = labels[order]
        self.paths = StringTable(paths[index] for index in order)
        if tree.left_out:
            logger.warning("%s: left out: %s", self.folder, tree.describe_left_out())
        if tree.dangling:
            message = "%s: dangling links, %d in all, such as %s; DATA.ON_ERROR says what happens to such images"
            logger.warning(message, self.folder, len(tree.dangling), tree.dangling[0])

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

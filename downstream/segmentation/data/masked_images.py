"""Images with masks, in ADE20K's folders or in a simple layout for other data."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageOps

from data.decoding import open_image, to_rgb
from data.errors import BrokenImageError, DataError
from data.sources.labels import read_lines
from downstream.image_files import IMAGE_SUFFIXES, files_by_name
from downstream.segmentation.model.losses import IGNORED

INDEX_MODES = ("P", "L", "1", "I", "I;16")  # of mask files: one number per pixel
ADE20K_CLASSES = Path(__file__).with_name("ade20k_classes.txt")
MAX_NAMES_SHOWN = 5
MAX_PIXELS = 178_956_970  # Pillow's own limit, for aerial images


class Layout(NamedTuple):
    """Folders and files of a kind of dataset, relative to its root."""

    images: str
    masks: str
    splits: dict[str, str]  # folder of each split, in both
    classes: Path  # file with one class per line


LAYOUTS = {
    "ade20k": Layout("images", "annotations", {"train": "training", "val": "validation"}, ADE20K_CLASSES),
    "folder": Layout("images", "masks", {"train": "train", "val": "val"}, Path("classes.txt")),
}


class MaskedImages:
    """The images of one split, with their masks.

    `images/<split>/<name>.jpg` pairs with `masks/<split>/<name>.png`; <name> may contain folders. A mask is a palette,
    grayscale or index PNG of the image's size: its numbers are classes, in the order of the class file, and 255 is
    ignored. With `reduce_zero_label` 0 is ignored too, and classes start at 1.

    Args:
        root: the dataset's folder.
        split: "train" or "val".
        layout: "ade20k" (images/training, annotations/training, ..., the 150 classes of the scene parsing benchmark)
            or "folder" (images/train, masks/train, ..., classes.txt).
        reduce_zero_label: masks hold 0 where a pixel has no class.

    Raises:
        MissingFileError: a folder is missing.
        DataError: classes or images are missing, or images and masks do not pair.
    """

    def __init__(self, root: str, split: str, *, layout: str, reduce_zero_label: bool) -> None:
        paths = LAYOUTS[layout]
        subfolder = paths.splits[split]
        self.classes = read_classes(Path(root) / paths.classes)
        images = files_by_name(Path(root) / paths.images / subfolder, IMAGE_SUFFIXES)
        masks = files_by_name(Path(root) / paths.masks / subfolder, (".png",))
        for files, others, kind in ((images, masks, "a mask"), (masks, images, "an image")):
            if unpaired := sorted(files.keys() - others.keys()):
                shown = ", ".join(str(files[name]) for name in unpaired[:MAX_NAMES_SHOWN])
                more = ", ..." if len(unpaired) > MAX_NAMES_SHOWN else ""
                raise DataError(f"files without {kind} of the same name, {len(unpaired)} in all: {shown}{more}")
        self.reduce_zero_label = reduce_zero_label
        self.names = sorted(images)
        self.image_paths = [images[name] for name in self.names]
        self.mask_paths = [masks[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image (H, W, 3), RGB, and mask (H, W), class indices and IGNORED, both uint8.

        Raises:
            DataError: a file cannot be read, the sizes differ, or the mask has a value that is no class.
        """
        image = read_image(self.image_paths[index])
        path = self.mask_paths[index]
        mask = read_mask(path, num_classes=len(self.classes), reduce_zero_label=self.reduce_zero_label)
        if mask.shape != image.shape[:2]:
            sizes = [f"{width}x{height}" for height, width in (mask.shape, image.shape[:2])]
            raise DataError(f"{path}: the mask is {sizes[0]} pixels, its image {self.image_paths[index]} is {sizes[1]}")
        return image, mask

    def classes_without_pixels(self) -> list[str]:
        """Return the classes of which no mask has a pixel; reads all masks.

        Raises:
            DataError: as `read_mask`.
        """
        counts = np.zeros(256, dtype=np.int64)
        for path in self.mask_paths:
            mask = read_mask(path, num_classes=len(self.classes), reduce_zero_label=self.reduce_zero_label)
            counts += np.bincount(mask.ravel(), minlength=256)
        return [name for label, name in enumerate(self.classes) if not counts[label]]


def read_classes(path: Path) -> list[str]:
    """Return the names of classes in a file, one per line; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, holds no names, too many for a mask's 8 bits, or a name twice.
    """
    lines = read_lines(path, "it must hold the names of the classes, one per line")
    classes = [line.strip() for line in lines if line.strip()]
    if not 2 <= len(classes) <= IGNORED:
        raise DataError(
            f"{path}: holds {len(classes)} classes; must be 2 to {IGNORED}, one per line, with a class for the rest of "
            "the image if there is one kind of object"
        )
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise DataError(f"{path}: {', '.join(twice[:MAX_NAMES_SHOWN])} occurs more than once")
    return classes


@contextmanager
def image_errors_of(path: Path) -> Iterator[None]:
    """Name the file in the errors of reading an image."""
    try:
        yield
    except BrokenImageError as error:
        raise BrokenImageError(f"{path}: cannot be read as an image ({error})") from error


def read_image(path: Path) -> np.ndarray:
    """Return an image file as (H, W, 3) uint8, RGB, rotated as its EXIF data say.

    Raises:
        BrokenImageError: it cannot be read.
    """
    with image_errors_of(path), open_image(path, MAX_PIXELS) as file:
        return np.asarray(to_rgb(ImageOps.exif_transpose(file)))


def read_mask(path: Path, *, num_classes: int, reduce_zero_label: bool) -> np.ndarray:
    """Return a mask file as class indices, (H, W) uint8, IGNORED where a pixel has no class.

    Raises:
        BrokenImageError: it cannot be read.
        DataError: it has colors instead of indices, or a value that is no class.
    """
    with image_errors_of(path), open_image(path, MAX_PIXELS) as file:
        mode, values = file.mode, np.asarray(file)
    if mode not in INDEX_MODES:
        raise DataError(
            f"{path}: a mask must hold one number per pixel (palette, grayscale or index PNG), but its mode is {mode}"
        )
    values = values.astype(np.int32)
    first = int(reduce_zero_label)  # the number of the first class
    wrong = np.unique(values[(values < 0) | ((values >= num_classes + first) & (values != IGNORED))])
    if len(wrong):
        allowed = f"{first} to {num_classes + first - 1}, {'0 and ' if first else ''}{IGNORED} for ignored pixels"
        raise DataError(
            f"{path}: the mask holds {', '.join(map(str, wrong[:MAX_NAMES_SHOWN]))}; with {num_classes} classes and "
            f"DATA.REDUCE_ZERO_LABEL {reduce_zero_label} must be {allowed}"
        )
    return np.where((values == IGNORED) | (values < first), IGNORED, values - first).astype(np.uint8)

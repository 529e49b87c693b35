"""Images with masks: ADE20K's folders, and a plain layout for one's own data."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.decoding import to_rgb
from downstream.segmentation.model.losses import IGNORED

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
INDEX_MODES = ("P", "L", "1", "I", "I;16")  # of mask files: one number a pixel
ADE20K_CLASSES = Path(__file__).with_name("ade20k_classes.txt")
MAX_NAMES_SHOWN = 5


class DataError(OSError):
    """Images or masks that are missing, cannot be read, or do not fit: one line that names the file."""


class Layout(NamedTuple):
    """Where a kind of data set keeps its files, below its root."""

    images: str
    masks: str
    splits: dict[str, str]  # folder of each split, within the two
    classes: Path  # file with a class a line; relative to the root


LAYOUTS = {
    "ade20k": Layout("images", "annotations", {"train": "training", "val": "validation"}, ADE20K_CLASSES),
    "folder": Layout("images", "masks", {"train": "train", "val": "val"}, Path("classes.txt")),
}


class MaskedImages:
    """The images of one split, with their masks.

    `images/<split>/<name>.jpg` goes with `masks/<split>/<name>.png`; folders within a split are kept apart. A mask
    is a palette, grayscale or index PNG of the image's size: its numbers are classes, in the order of the class file,
    and 255 is ignored. With `reduce_zero_label` 0 is ignored too, and classes start at 1.

    Args:
        root: the data set's folder.
        split: "train" or "val".
        layout: "ade20k" (images/training, annotations/training, ..., the 150 classes of the scene parsing benchmark)
            or "folder" (images/train, masks/train, ..., classes.txt).
        reduce_zero_label: masks hold 0 where a pixel has no class.

    Raises:
        DataError: folders, classes or images are missing, or images and masks do not pair.
    """

    def __init__(self, root: str, split: str, *, layout: str, reduce_zero_label: bool) -> None:
        places = LAYOUTS[layout]
        if not root:
            raise DataError("DATA.DATA_PATH is empty: name the data set's folder with --data-path")
        subfolder = places.splits[split]
        self.classes = read_classes(Path(root) / places.classes)
        images = files_by_name(Path(root) / places.images / subfolder, IMAGE_SUFFIXES)
        masks = files_by_name(Path(root) / places.masks / subfolder, (".png",))
        for found, others, kind in ((images, masks, "a mask"), (masks, images, "an image")):
            if lonely := sorted(found.keys() - others.keys()):
                shown = ", ".join(str(found[name]) for name in lonely[:MAX_NAMES_SHOWN])
                more = ", ..." if len(lonely) > MAX_NAMES_SHOWN else ""
                raise DataError(f"{len(lonely)} file(s) without {kind} of the same name: {shown}{more}")
        self.reduce_zero_label = reduce_zero_label
        self.names = sorted(images)
        self.image_paths = [images[name] for name in self.names]
        self.mask_paths = [masks[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3), RGB, and mask (H, W), class indices and IGNORED, both uint8.

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


def read_classes(path: Path) -> list[str]:
    """Names of classes, one a line; empty lines do not count.

    Raises:
        DataError: no such file, no names, too many for a mask's 8 bits, or a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); it must hold the names of the classes, one a line"
        ) from None
    classes = [line.strip() for line in lines if line.strip()]
    if not 1 <= len(classes) <= IGNORED:
        raise DataError(f"{path}: holds {len(classes)} classes; must be 1 to {IGNORED}, one a line")
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise DataError(f"{path}: {', '.join(twice[:MAX_NAMES_SHOWN])} stands there more than once")
    return classes


def files_by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files below a folder by their path in it without suffix.

    Raises:
        DataError: no such folder, nothing in it, or two files of one name.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; see downstream/segmentation/README.md for what a data set must hold"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise DataError(f"{path}: {found[name].name} has the same name; each image needs one of its own")
            found[name] = path
    if not found:
        raise DataError(f"{folder}: no files that end in {', '.join(suffixes)}")
    return found


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8, RGB, turned as its EXIF note says.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            return np.asarray(to_rgb(ImageOps.exif_transpose(file)))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from None


def read_mask(path: Path, *, num_classes: int, reduce_zero_label: bool) -> np.ndarray:
    """A mask file as class indices, (H, W) uint8, IGNORED where there is none.

    Raises:
        DataError: it cannot be read, has colors in place of indices, or a value that is no class.
    """
    try:
        with Image.open(path) as file:
            mode, values = file.mode, np.asarray(file)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from None
    if mode not in INDEX_MODES:
        raise DataError(
            f"{path}: a mask must hold one number a pixel (palette, grayscale or index PNG), but its mode is {mode}"
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

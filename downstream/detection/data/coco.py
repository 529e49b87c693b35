"""Images and objects of a COCO annotation file."""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from faster_coco_eval import mask as rle

from data.decoding import open_image
from data.errors import BrokenImageError, DataError, as_data_error
from downstream.detection.data.annotations import read_annotations
from utils.config.errors import MissingFileError
from utils.logs.logger import logger

MIN_SIDE = 32  # pixels; smaller images are not trained on
MAX_HEADERS = 5000  # read when a file is opened: a second on a disk
ORIENTATION, FIRST_TURNED = 0x0112, 5  # the EXIF tag, and its first value that exchanges width and height
Segmentation = Any  # polygons, a list of lists x y x y ..., or run lengths, a dict with size and counts


class Record(NamedTuple):
    """An image of the file and its G objects, without crowds.

    Attributes:
        image_id: id in the annotation file.
        file_name: path within the folder of images.
        height, width: size in pixels.
        boxes: (G, 4) float32, x1 y1 x2 y2 in pixels, within the image.
        labels: (G,) int64, from 0.
        segmentations: polygons or run lengths, one for each object.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: list[Segmentation]


class CocoImages:
    """Images of an annotation file, by index.

    Crowds, objects without area and objects outside the image are skipped; boxes are clipped to the image. Class i is
    the i-th category by id; ids may have gaps.

    Args:
        annotations: path of the file, in COCO's "instances" format.
        folder: folder of the images.
        for_training: skip images without objects or with a side under 32 pixels.

    Raises:
        MissingFileError: the file, the folder or images in it are missing.
        DataError: the file is not of that format, or contradicts itself.
    """

    def __init__(self, annotations: str | Path, folder: str | Path, *, for_training: bool) -> None:
        self.annotations, self.folder = Path(annotations), Path(folder)
        content = read_annotations(self.annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.classes = [str(category["name"]) for category in categories]
        self.categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
        records = self.records_of(content)
        if for_training:
            records = self.training_records(records)
        if not records:
            raise DataError(f"{self.annotations}: no {'usable training ' if for_training else ''}images in it")
        self.check_files([record.file_name for record in records])
        self.check_sizes(records)
        self.aspect_ratios = np.array([record.width / record.height for record in records])
        # One block of bytes: of Python objects, each worker process would end up with a copy (reference counts).
        pickled = [pickle.dumps(record, protocol=-1) for record in records]
        self.ends = np.cumsum([len(item) for item in pickled])
        self.bytes = np.frombuffer(b"".join(pickled), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Record:
        start = self.ends[index - 1] if index else 0
        return pickle.loads(self.bytes[start : self.ends[index]].tobytes())  # safe: __init__ pickled it

    def records_of(self, content: dict[str, Any]) -> list[Record]:
        """Return a record for each image, in the file's order."""
        labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        images = {image["id"]: image for image in content["images"]}
        objects: dict[int, list[tuple[list[float], int, Segmentation]]] = {image_id: [] for image_id in images}
        for annotation in content["annotations"]:
            image_id = annotation["image_id"]
            box = clipped_box(annotation["bbox"], images[image_id])
            if box is not None and not annotation["iscrowd"]:
                objects[image_id].append((box, labels[annotation["category_id"]], annotation["segmentation"]))
        return [
            Record(
                image_id,
                image["file_name"],
                image["height"],
                image["width"],
                np.array([box for box, _, _ in objects[image_id]], dtype=np.float32).reshape(-1, 4),
                np.array([label for _, label, _ in objects[image_id]], dtype=np.int64),
                [segmentation for _, _, segmentation in objects[image_id]],
            )
            for image_id, image in images.items()
        ]

    def training_records(self, records: Sequence[Record]) -> list[Record]:
        """Return the records to train on, and log how many others there are, and which classes have no object."""
        chosen = [r for r in records if len(r.boxes) and min(r.height, r.width) >= MIN_SIDE]
        if len(chosen) < len(records):
            message = (
                "%s: %d of %d images are not trained on, being without objects or less than %d pixels wide or high"
            )
            logger.info(message, self.annotations, len(records) - len(chosen), len(records), MIN_SIDE)
        used = set(np.concatenate([record.labels for record in chosen]).tolist()) if chosen else set()
        if unused := [name for label, name in enumerate(self.classes) if label not in used]:
            message = "%s: %d of %d categories have no object to train on: %s"
            logger.warning(message, self.annotations, len(unused), len(self.classes), ", ".join(unused[:10]))
        return chosen

    def check_files(self, names: Sequence[str]) -> None:
        """Check before training, not after hours of it, that no image is missing.

        Raises:
            MissingFileError: the folder or images in it are missing.
        """
        with as_data_error(self.folder):
            if not self.folder.is_dir():
                raise MissingFileError(f"{self.folder}: no such folder; it must hold the images of {self.annotations}")
            present = {entry.name for entry in os.scandir(self.folder) if entry.is_file()}
            missing = [name for name in names if name not in present and not (self.folder / name).is_file()]
        if missing:
            raise MissingFileError(
                f"{self.folder}: {len(missing)} of the {len(names)} images of {self.annotations} are not there, "
                f"such as {missing[0]}; add them, or remove them from the file"
            )

    def check_sizes(self, records: Sequence[Record]) -> None:
        """Compare listed sizes with the files' headers before training, of evenly spaced images if there are many.

        Raises:
            DataError: as `read_image`, which checks every image when it is read.
        """
        for record in records[:: -(-len(records) // MAX_HEADERS)]:
            if header_size(self.folder / record.file_name) != (record.height, record.width):
                self.read_image(record)  # raises, unless OpenCV sees what Pillow does not

    def read_image(self, record: Record) -> np.ndarray:
        """Return the image, (H, W, 3) uint8, RGB.

        Raises:
            BrokenImageError: the file cannot be read as an image.
            DataError: its size is not the one listed.
        """
        path = self.folder / record.file_name
        image = read_image(path)
        if image.shape[:2] != (record.height, record.width):
            is_turned = image.shape[:2] == (record.width, record.height)
            raise DataError(
                f"{path}: is {image.shape[1]}x{image.shape[0]} pixels, but {self.annotations} says "
                f"{record.width}x{record.height}; its boxes would not fit"
                + ("; if its EXIF data turn it, save it without them, or list it as it is seen" if is_turned else "")
            )
        return image

    def read_masks(self, record: Record) -> list[np.ndarray]:
        """Return the masks of a record's objects, (H, W) uint8 each, 0 or 1."""
        return [decode_mask(item, record.height, record.width) for item in record.segmentations]


def read_image(path: str | Path) -> np.ndarray:
    """Return an image file as (H, W, 3) uint8, RGB.

    Raises:
        MissingFileError: there is no such file.
        BrokenImageError: it is not an image.
        DataError: it cannot be read.
    """
    with as_data_error(path):
        if not Path(path).is_file():
            raise MissingFileError(f"{path}: no such image file")
        content = np.fromfile(path, dtype=np.uint8)
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    except cv2.error:  # such as too many pixels
        image = None
    if image is None:
        raise BrokenImageError(f"{path}: cannot be read as an image; it is damaged, or of another format")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def header_size(path: Path) -> tuple[int, int] | None:
    """Return the height and width in an image file's header, turned as its EXIF data say; None if there are none."""
    try:
        with open_image(path) as image:
            width, height = image.size
            is_turned = "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= FIRST_TURNED
    except BrokenImageError:
        return None
    return (width, height) if is_turned else (height, width)


def clipped_box(bbox: Sequence[float], image: dict[str, Any]) -> list[float] | None:
    """Return COCO's x, y, width, height as x1 y1 x2 y2, clipped to the image.

    None if a side is under a pixel, or the box lies outside the image.
    """
    x, y, width, height = (float(value) for value in bbox)
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + width, image["width"]), min(y + height, image["height"])
    return [x1, y1, x2, y2] if width >= 1 and height >= 1 and x2 > x1 and y2 > y1 else None


def decode_mask(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """Return a segmentation as (height, width) uint8, 0 or 1."""
    if isinstance(segmentation, list):
        encoded = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = rle.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    return rle.decode(encoded)

"""Images and objects of a COCO annotation file."""

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from faster_coco_eval import mask as rle

from data.errors import BrokenImageError, DataError, as_data_error
from utils.config.errors import MissingFileError

MIN_SIDE = 32  # pixels; smaller images are not trained on
Segmentation = Any  # polygons, a list of lists x y x y ..., or run lengths, a dict with size and counts
NEEDED_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


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
        self.category_ids = [int(category["id"]) for category in categories]
        self.classes = [str(category["name"]) for category in categories]
        self.categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
        records = self.records_of(content)
        if for_training:
            records = [r for r in records if len(r.boxes) and min(r.height, r.width) >= MIN_SIDE]
        if not records:
            raise DataError(f"{self.annotations}: no {'usable training ' if for_training else ''}images in it")
        self.check_files([record.file_name for record in records])
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
            image_id, category_id = annotation["image_id"], annotation["category_id"]
            where = f"{self.annotations}: annotation {annotation.get('id')}"
            if image_id not in images or category_id not in labels:
                field, value = ("category_id", category_id) if image_id in images else ("image_id", image_id)
                raise DataError(f"{where} has {field} {value}, not listed in the file")
            if not annotation.get("segmentation"):
                raise DataError(f"{where} has no segmentation; Mask R-CNN needs a mask for each object")
            try:
                box = clipped_box(annotation["bbox"], images[image_id])
            except (TypeError, ValueError):
                bbox = annotation["bbox"]
                raise DataError(f"{where} has bbox {bbox}; must be four numbers: x, y, width, height") from None
            if box is not None and not annotation.get("iscrowd"):
                objects[image_id].append((box, labels[category_id], annotation["segmentation"]))
        return [
            Record(
                image_id,
                str(image["file_name"]),
                int(image["height"]),
                int(image["width"]),
                np.array([box for box, _, _ in objects[image_id]], dtype=np.float32).reshape(-1, 4),
                np.array([label for _, label, _ in objects[image_id]], dtype=np.int64),
                [segmentation for _, _, segmentation in objects[image_id]],
            )
            for image_id, image in images.items()
        ]

    def check_files(self, names: Sequence[str]) -> None:
        """Check before training, not after hours of it, that no image is missing.

        Raises:
            MissingFileError: the folder or images in it are missing.
        """
        with as_data_error(self.folder):
            if not self.folder.is_dir():
                raise MissingFileError(f"{self.folder}: no such folder; it must hold the images of {self.annotations}")
            present = {entry.name for entry in os.scandir(self.folder)}
            missing = [name for name in names if name not in present and not (self.folder / name).is_file()]
        if missing:
            raise MissingFileError(
                f"{self.folder}: {len(missing)} of the {len(names)} images of {self.annotations} are not there, "
                f"such as {missing[0]}; add them, or remove them from the file"
            )

    def read_image(self, record: Record) -> np.ndarray:
        """Return the image, (H, W, 3) uint8, RGB.

        Raises:
            BrokenImageError: the file cannot be read as an image.
            DataError: its size is not the one listed.
        """
        path = self.folder / record.file_name
        image = read_image(path)
        if image.shape[:2] != (record.height, record.width):
            raise DataError(
                f"{path}: is {image.shape[1]}x{image.shape[0]} pixels, but {self.annotations} says "
                f"{record.width}x{record.height}; its boxes would not fit"
            )
        return image

    def read_masks(self, record: Record) -> list[np.ndarray]:
        """Return the masks of a record's objects, (H, W) uint8 each, 0 or 1.

        Raises:
            DataError: a segmentation cannot be decoded.
        """
        try:
            return [decode_mask(item, record.height, record.width) for item in record.segmentations]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise DataError(
                f"{self.annotations}: image {record.image_id} has a segmentation that cannot be decoded ({text})"
            ) from error


def read_image(path: str | Path) -> np.ndarray:
    """Return an image file as (H, W, 3) uint8, RGB.

    Raises:
        MissingFileError: there is no such file.
        BrokenImageError: it is not an image.
        DataError: it cannot be read.
    """
    with as_data_error(path):
        if not Path(path).exists():
            raise MissingFileError(f"{path}: no such image file")
        content = np.fromfile(path, dtype=np.uint8)
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    except cv2.error:  # such as too many pixels
        image = None
    if image is None:
        raise BrokenImageError(f"{path}: cannot be read as an image; it is damaged, or of another format")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_annotations(path: Path) -> dict[str, Any]:
    """Return the content of an annotation file, after a check that it has COCO's three lists.

    Raises:
        MissingFileError: there is no such file.
        DataError: it cannot be read, or is not of that format.
    """
    try:
        with as_data_error(path):
            if not path.is_file():
                raise MissingFileError(f"{path}: no such annotation file; DATA.* says where it is expected")
            content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: is not a JSON file ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in NEEDED_KEYS):
        raise DataError(f"{path}: is not a COCO annotation file: it needs the lists {', '.join(NEEDED_KEYS)}")
    for name, keys in NEEDED_KEYS.items():
        for number, item in enumerate(content[name]):
            if not isinstance(item, dict):
                raise DataError(f"{path}: item {number} of {name} is not an object")
            if missing := [key for key in keys if key not in item]:
                raise DataError(f"{path}: item {number} of {name} has no {missing[0]}")
    return content


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
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return np.zeros((height, width), dtype=np.uint8)
        encoded = rle.merge(rle.frPyObjects(polygons, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = rle.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    return rle.decode(encoded)

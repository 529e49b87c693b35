"""Images and objects from a COCO annotation file."""

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from faster_coco_eval import mask as rle

MIN_SIDE = 32  # of images that are trained on
Segmentation = Any  # polygons, a list of lists x y x y ..., or run lengths, a dict with size and counts


class Record(NamedTuple):
    """An image of the file, and its objects but for crowds.

    Attributes:
        image_id: COCO's.
        file_name: within the folder of images.
        height, width: in pixels.
        boxes: (G, 4) float32, x1 y1 x2 y2, within the image.
        labels: (G,) int64, from 0.
        segmentations: of each object.
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

    Crowds, objects without area and objects outside the image are left out; boxes are cut to the image. Class i is the
    i-th category by id, whatever gaps the ids have.

    Args:
        annotations: path of the file (COCO's "instances" format).
        folder: where the images are.
        for_training: leave out images without objects or with a side under 32 pixels.

    Raises:
        FileNotFoundError: the file, the folder or images in it are missing.
        ValueError: the file is not of that format, or contradicts itself.
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
            raise ValueError(f"{self.annotations}: no {'usable training ' if for_training else ''}images in it")
        self.check_files([record.file_name for record in records])
        self.aspect_ratios = np.array([record.width / record.height for record in records])
        # As one block of bytes: as Python objects, each worker process would come to own a copy of all of them.
        pickled = [pickle.dumps(record, protocol=-1) for record in records]
        self.ends = np.cumsum([len(item) for item in pickled])
        self.bytes = np.frombuffer(b"".join(pickled), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Record:
        start = self.ends[index - 1] if index else 0
        return pickle.loads(self.bytes[start : self.ends[index]].tobytes())  # written above, by this process

    def records_of(self, content: dict[str, Any]) -> list[Record]:
        """A record for each image, in the file's order."""
        labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
        images = {image["id"]: image for image in content["images"]}
        objects: dict[int, list[tuple[list[float], int, Segmentation]]] = {image_id: [] for image_id in images}
        for annotation in content["annotations"]:
            image_id, category_id = annotation["image_id"], annotation["category_id"]
            if image_id not in images or category_id not in labels:
                field, value = ("category_id", category_id) if image_id in images else ("image_id", image_id)
                raise ValueError(
                    f"{self.annotations}: annotation {annotation.get('id')} has {field} {value}, not listed there"
                )
            if not annotation.get("segmentation"):
                raise ValueError(
                    f"{self.annotations}: annotation {annotation.get('id')} has no segmentation; Mask R-CNN learns and "
                    f"is judged by masks, and needs one for each object"
                )
            box = clipped(annotation["bbox"], images[image_id])
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
        """Find out before training, not after hours of it, that images are missing."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder; it must hold the images of {self.annotations}")
        present = {entry.name for entry in os.scandir(self.folder)}
        missing = [name for name in names if name not in present and not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: {len(missing)} of the {len(names)} images of {self.annotations} are not there, "
                f"such as {missing[0]}; add them, or take them out of the file"
            )

    def read_image(self, record: Record) -> np.ndarray:
        """The image (H, W, 3), uint8, RGB.

        Raises:
            OSError: the file cannot be read as an image.
            ValueError: its size is not the one listed.
        """
        path = self.folder / record.file_name
        image = read_image(path)
        if image.shape[:2] != (record.height, record.width):
            raise ValueError(
                f"{path}: is {image.shape[1]}x{image.shape[0]} pixels, but {self.annotations} says "
                f"{record.width}x{record.height}; its boxes would not fit"
            )
        return image


def read_image(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3), uint8, RGB.

    Raises:
        OSError: it is missing, or not an image.
    """
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such image file") from error
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if image is None:
        raise OSError(f"{path}: cannot be read as an image; it is damaged, or of another format")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_annotations(path: Path) -> dict[str, Any]:
    """The content of an annotation file, once it is found to have COCO's three lists.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not of that format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file; see DATA.* for where it is looked for")
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not a JSON file ({error})") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
        raise ValueError(f"{path}: is not a COCO annotation file: it needs the lists {', '.join(lists)}")
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name")}
    needed["annotations"] = ("image_id", "category_id", "bbox")
    for name, keys in needed.items():
        for number, item in enumerate(content[name]):
            if missing := [key for key in keys if key not in item]:
                raise ValueError(f"{path}: item {number} of {name} has no {missing[0]}")
    return content


def clipped(bbox: Sequence[float], image: dict[str, Any]) -> list[float] | None:
    """COCO's x, y, width, height as x1 y1 x2 y2 within the image; None where a side is under a pixel, or nothing of
    it lies inside.
    """
    x, y, width, height = (float(value) for value in bbox)
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + width, image["width"]), min(y + height, image["height"])
    return [x1, y1, x2, y2] if width >= 1 and height >= 1 and x2 > x1 and y2 > y1 else None


def bitmap(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """A segmentation as (height, width) uint8, 0 or 1."""
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

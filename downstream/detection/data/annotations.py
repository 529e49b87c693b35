"""COCO annotation files, checked as a whole when they are opened, before anything trains.

What is harmless is repaired and counted in one line of the log; anything else is an error in one line, which names the
file, the annotation and the image. Training and the evaluator read the repaired content.
"""

import json
from collections import Counter
from math import inf, isfinite
from operator import mul
from pathlib import Path
from typing import Any

from data.errors import DataError, as_data_error
from downstream.detection.data.run_lengths import COMPRESSED, totals_of
from utils.config.errors import MissingFileError, cut, shown
from utils.logs.logger import logger

MAX_PIXELS = 2**30  # of an image: OpenCV's limit
LARGEST_ID = 2**53
NEEDED_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
Item = dict[str, Any]  # an image, a category or an annotation


def read_annotations(path: Path, *, log_repairs: bool = True) -> dict[str, list[Item]]:
    """Return the checked content of an annotation file, repaired where that changes no object.

    Ids and sizes are integers, annotation ids are unique and positive, and each annotation has `iscrowd`, `area` and a
    segmentation, of polygons with at least three points or of run lengths of the image's size.

    Raises:
        MissingFileError: there is no such file.
        DataError: it cannot be read, is not of that format, or contradicts itself.
    """
    content = read_lists(path)
    check = AnnotationCheck(path, content)
    check.check_images()
    check.check_categories()
    check.check_annotations()
    if check.repairs and log_repairs:
        repairs = ", ".join(f"{count} {what}" for what, count in check.repairs.items())
        logger.warning("%s: repaired as it was read, the file is unchanged: %s", path, repairs)
    return content


def read_lists(path: Path) -> dict[str, list[Item]]:
    """Return the content of an annotation file, after a check that it has COCO's three lists and their keys."""
    with as_data_error(path):
        if not path.is_file():
            raise MissingFileError(f"{path}: no such annotation file; DATA.* says where it is expected")
        encoded = path.read_bytes()
    try:
        content = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not a JSON file ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in NEEDED_KEYS):
        raise DataError(f"{path}: is not a COCO annotation file: it needs the lists {', '.join(NEEDED_KEYS)}")
    for name, keys in NEEDED_KEYS.items():
        for number, item in enumerate(content[name]):
            if not isinstance(item, dict):
                raise DataError(f"{path}: item {number} of {name} is not an object")
            for key in keys:
                if key not in item:
                    raise DataError(f"{path}: item {number} of {name} has no {key}")
    return content


class AnnotationCheck:
    """Checks of a file's content, which change it in place, and the number of repairs of each kind."""

    def __init__(self, path: Path, content: dict[str, list[Item]]) -> None:
        self.path = path
        self.content = content
        self.repairs: Counter[str] = Counter()
        self.images: dict[int, Item] = {}
        self.category_ids: set[int] = set()
        self.compressed: list[tuple[int, Item]] = []  # positions and annotations, checked together at the end

    def check_images(self) -> None:
        for number, image in enumerate(self.content["images"]):
            where = f"{self.path}: item {number} of images"
            image_id = self.integer(image, "id", where)
            if image_id in self.images:
                raise DataError(f"{where}: id {image_id} occurs twice; each image needs an id of its own")
            if not isinstance(image["file_name"], str) or not image["file_name"]:
                raise DataError(f"{where}: file_name is {shown(image['file_name'])}; must be a path")
            height, width = self.integer(image, "height", where), self.integer(image, "width", where)
            if height < 1 or width < 1 or height * width > MAX_PIXELS:
                raise DataError(
                    f"{where}: {cut(image['file_name'])} has a size of {width}x{height} pixels; no image has"
                )
            self.images[image_id] = image

    def check_categories(self) -> None:
        for number, category in enumerate(self.content["categories"]):
            where = f"{self.path}: item {number} of categories"
            category_id = self.integer(category, "id", where)
            if category_id in self.category_ids:
                raise DataError(f"{where}: id {category_id} occurs twice; each category needs an id of its own")
            if category["name"] is None or not str(category["name"]).strip():
                raise DataError(f"{where}: category {category_id} has no name")
            self.category_ids.add(category_id)
        if not self.category_ids:
            raise DataError(f"{self.path}: the list categories is empty; it names the classes of the objects")

    def check_annotations(self) -> None:
        for number, annotation in enumerate(self.content["annotations"]):
            for key, known in (("image_id", self.images), ("category_id", self.category_ids)):
                value = annotation[key]
                if type(value) is not int:
                    value = self.integer(annotation, key, self.name_of(number))
                if value not in known:
                    raise DataError(f"{self.name_of(number)} has {key} {shown(value)}, not listed in the file")
            if not is_box(annotation["bbox"]):
                bbox = annotation["bbox"]
                raise DataError(
                    f"{self.name_of(number)} has bbox {shown(bbox)}; must be four numbers: x, y, width, height"
                )
            crowd = annotation.get("iscrowd")
            if type(crowd) is not int or crowd not in (0, 1):
                self.repair_crowd(number)
            self.check_segmentation(number)
            area: Any = annotation.get("area")
            if type(area) not in (int, float) or not 0 <= area < inf:
                annotation["area"] = None
                self.repairs["areas missing or no numbers, computed from the masks"] += 1
                if isinstance(annotation["segmentation"], list):
                    annotation["area"] = sum(map(polygon_area, annotation["segmentation"]))
                elif isinstance(annotation["segmentation"]["counts"], list):
                    annotation["area"] = sum(annotation["segmentation"]["counts"][1::2])
        self.check_compressed()
        self.number_annotations()

    def repair_crowd(self, number: int) -> None:
        """Set an `iscrowd` that is missing or a boolean to 0 or 1."""
        annotation = self.content["annotations"][number]
        crowd = annotation.get("iscrowd")
        if crowd not in (None, 0, 1):
            raise DataError(f"{self.name_of(number)} has iscrowd {shown(crowd)}; must be 0 or 1")
        annotation["iscrowd"] = int(crowd or 0)
        self.repairs["annotations without iscrowd 0 or 1"] += 1

    def check_segmentation(self, number: int) -> None:
        annotation = self.content["annotations"][number]
        segmentation = annotation.get("segmentation")
        if not segmentation:
            raise DataError(f"{self.name_of(number)} has no segmentation; Mask R-CNN needs a mask for each object")
        if isinstance(segmentation, dict):
            self.check_run_lengths(number, segmentation)
        elif isinstance(segmentation, list):
            if type(segmentation[0]) in (int, float):
                segmentation = annotation["segmentation"] = [segmentation]
                self.repairs["flat lists of numbers, read as one polygon each"] += 1
            self.check_polygons(number, segmentation)
        else:
            raise DataError(f"{self.name_of(number)} has a segmentation that is neither polygons nor run lengths")

    def check_polygons(self, number: int, polygons: list[Any]) -> None:
        """Drop polygons of less than three points, and refuse what is no polygon, or far outside the image."""
        annotation = self.content["annotations"][number]
        image = self.images[annotation["image_id"]]
        margin = max(image["height"], image["width"])
        for polygon in polygons:
            if problem := polygon_problem(polygon, low=-margin, high=2 * margin):
                raise DataError(f"{self.name_of(number)} has a polygon {problem}")
        kept = [polygon for polygon in polygons if len(polygon) >= 6]
        if not kept:
            raise DataError(f"{self.name_of(number)} has no polygon of at least three points: x y x y x y ...")
        if len(kept) < len(polygons):
            annotation["segmentation"] = kept
            self.repairs["polygons of less than three points, left out"] += len(polygons) - len(kept)

    def check_run_lengths(self, number: int, segmentation: Item) -> None:
        """Refuse run lengths of another size than the image's, or whose runs do not add up to it."""
        annotation = self.content["annotations"][number]
        image = self.images[annotation["image_id"]]
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [image["height"], image["width"]]:
            raise DataError(
                f"{self.name_of(number)} has run lengths of size {shown(size)}; must be the image's "
                f"[{image['height']}, {image['width']}], height and width"
            )
        segmentation["size"] = [image["height"], image["width"]]  # integers
        if isinstance(counts, str) and COMPRESSED.fullmatch(counts):
            self.compressed.append((number, annotation))
        elif isinstance(counts, list) and set(map(type, counts)) == {int}:
            self.check_total(number, sum(counts) if min(counts) >= 0 else -1)
        else:
            raise DataError(f"{self.name_of(number)} has counts that are no run lengths, or damaged ones")

    def check_compressed(self) -> None:
        """Check the totals of the compressed run lengths, and compute their missing areas."""
        if not self.compressed:
            return
        totals = totals_of([annotation["segmentation"]["counts"] for _, annotation in self.compressed])
        for (number, annotation), pixels, area in zip(self.compressed, *map(list, totals), strict=True):
            self.check_total(number, int(pixels))
            if annotation["area"] is None:
                annotation["area"] = int(area)

    def check_total(self, number: int, pixels: int) -> None:
        """Check the sum of an annotation's runs; -1 stands for a run of negative length."""
        image = self.images[self.content["annotations"][number]["image_id"]]
        if pixels != image["height"] * image["width"]:
            fault = "run lengths below 0" if pixels < 0 else f"runs that add up to {shown(pixels)} pixels"
            raise DataError(
                f"{self.name_of(number)} has {fault}; must be lengths of alternating runs, not positions, that add up "
                f"to the image's {image['height']} x {image['width']} = {image['height'] * image['width']} pixels"
            )

    def number_annotations(self) -> None:
        """Number the annotations from 1 if their ids are not unique positive integers.

        The evaluator takes id 0 for "not matched", and annotations of one id for one.
        """
        annotations = self.content["annotations"]
        ids = [annotation.get("id") for annotation in annotations]
        if all(type(item) is int and 0 < item <= LARGEST_ID for item in ids) and len(set(ids)) == len(ids):
            return
        for number, annotation in enumerate(annotations, 1):
            annotation["id"] = number
        self.repairs["annotations numbered anew, since ids were missing, not unique or not above 0"] = len(ids)

    def name_of(self, number: int) -> str:
        """Return an annotation's name in messages: file, id (without one its position in the list), and image."""
        annotation = self.content["annotations"][number]
        own_id, image_id = annotation.get("id"), annotation["image_id"]
        name = (
            f"annotation {shown(own_id)}"
            if type(own_id) is int
            else f"annotation without id (item {number} of annotations)"
        )
        image = self.images.get(image_id) if type(image_id) is int else None
        return f"{self.path}: {name}" + (f" of image {image_id}, {cut(image['file_name'])}," if image else "")

    def integer(self, item: Item, key: str, where: str) -> int:
        """Return an item's integer, after replacing a number without fraction or digits as text by it."""
        value = item[key]
        if type(value) is int and abs(value) <= LARGEST_ID:
            return value
        is_digits = isinstance(value, str) and value.isdecimal() and len(value) < 16
        if not is_digits and not (isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_ID):
            raise DataError(f"{where} has {key} {shown(value)}; must be a whole number")
        number = int(value)
        item[key] = number
        self.repairs["ids or sizes that were text or fractions, read as integers"] += 1
        return number


def is_box(bbox: Any) -> bool:
    """Return whether a value is four finite numbers, the last two not negative."""
    try:
        x, y, width, height = bbox
        return isfinite(x + y + width + height) and width >= 0 and height >= 0
    except (OverflowError, TypeError, ValueError):
        return False


def polygon_problem(polygon: Any, *, low: float, high: float) -> str | None:
    """Return what is wrong with x y x y ..., or None."""
    if type(polygon) is not list or len(polygon) % 2:
        return "that is not a list of numbers x y x y ..."
    try:
        is_inside = isfinite(sum(polygon)) and (not polygon or (low <= min(polygon) and max(polygon) <= high))
    except (OverflowError, TypeError):
        return "with something else than numbers"
    return None if is_inside else f"with a value that is not between {low} and {high}, far outside the image"


def polygon_area(polygon: list[float]) -> float:
    """Return the area within x y x y ..., by the shoelace formula."""
    xs, ys = polygon[0::2], polygon[1::2]
    return abs(sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, ys, xs[1:] + xs[:1]))) / 2

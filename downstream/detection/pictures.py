"""Images with detections drawn on them, next to the ground truth."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from faster_coco_eval import mask as rle
from matplotlib import colormaps
from PIL import Image, ImageDraw

from utils.logs.contact_sheet import Example, Size, Tile, fit, font, save_sheet

RGB = tuple[int, int, int]

MIN_SIDE = 384  # of a drawing, in pixels; smaller images are enlarged by a whole factor
ROW_HEIGHT = 260  # of the images on a sheet
OPACITY = 0.4  # of masks
COLORS: list[RGB] = [
    tuple(round(255 * part) for part in color)  # type: ignore[misc]
    for color in colormaps["tab10"].colors  # type: ignore[attr-defined]
]


class LabeledObjects(NamedTuple):
    """Objects of an image to draw, detected or true.

    Attributes:
        boxes: (D, 4), x1 y1 x2 y2 in pixels.
        masks: (D, H, W) bool.
        labels: (D,) int64, from 0.
        captions: text for each object.
    """

    boxes: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    captions: list[str]


def objects_of_results(
    results: Sequence[dict[str, Any]], categories: Sequence[dict[str, Any]], threshold: float = 0.5
) -> LabeledObjects:
    """Return the COCO results of one image that score at least `threshold`; categories have id and name."""
    chosen = [result for result in results if result["score"] >= threshold]
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    labels = np.array([numbers[result["category_id"]] for result in chosen], dtype=np.int64)
    boxes = np.array([result["bbox"] for result in chosen], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    encoded = [result["segmentation"] for result in chosen]
    masks = rle.decode(encoded).transpose(2, 0, 1) if chosen else np.zeros((0, 1, 1))  # (D, H, W)
    captions = [f"{categories[i]['name']} {r['score']:.2f}" for i, r in zip(labels, chosen, strict=True)]
    return LabeledObjects(boxes, masks.astype(bool), labels, captions)


def draw_objects(image: np.ndarray, objects: LabeledObjects, size: Size | None = None) -> np.ndarray:
    """Return an image (H, W, 3) uint8 with its objects' masks, boxes and labels.

    Args:
        image: the image.
        objects: their masks are tinted in their class's color; their labels avoid each other.
        size: width and height of the result; by default the image's, a whole multiple of it if it is small.
    """
    if size is None:
        factor = -(-MIN_SIDE // min(image.shape[:2])) if min(image.shape[:2]) < MIN_SIDE else 1
        size = image.shape[1] * factor, image.shape[0] * factor
    drawing = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if size[0] > image.shape[1] else cv2.INTER_AREA)
    colors = [COLORS[label % len(COLORS)] for label in objects.labels]
    for mask, color in zip(objects.masks[::-1], colors[::-1], strict=False):  # the first, most certain, on top
        draw_mask(drawing, mask, color)
    picture = Image.fromarray(drawing)
    draw = ImageDraw.Draw(picture)
    boxes = objects.boxes * np.array([size[0] / image.shape[1], size[1] / image.shape[0]] * 2)
    for box, color in zip(boxes[::-1], colors[::-1], strict=True):
        draw_box(draw, box, color, width=max(2, min(size) // 250))
    draw_labels(draw, boxes, objects.captions, colors, size)
    return np.asarray(picture)


def draw_mask(drawing: np.ndarray, mask: np.ndarray, color: RGB) -> None:
    """Tint the pixels of a mask, which has any size, in place, and outline it in white."""
    height, width = drawing.shape[:2]
    inside = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
    drawing[inside] = (drawing[inside] * (1 - OPACITY) + np.array(color) * OPACITY).round().astype(np.uint8)
    contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawing, contours, -1, (255, 255, 255), 1)


def draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, color: RGB, width: int) -> None:
    """Draw a box between two thin black ones, which set it off from objects of its own color."""
    left, top, right, bottom = (float(x) for x in box)
    right, bottom = max(left, right), max(top, bottom)
    for outset, line_width, line_color in ((1, width + 2, (0, 0, 0)), (0, width, color)):
        corners = left - outset, top - outset, right + outset, bottom + outset
        draw.rectangle(corners, outline=line_color, width=line_width)


def draw_labels(
    draw: ImageDraw.ImageDraw, boxes: np.ndarray, captions: Sequence[str], colors: Sequence[RGB], size: Size
) -> None:
    """Draw a filled label at each box, with text in black or white, whichever stands out."""
    font_size = max(11, min(size) // 40)
    texts = [fit(caption, size[0] - 4, font_size) for caption in captions]
    sizes = [(math.ceil(font(font_size).getlength(text)) + 4, font_size + 5) for text in texts]
    for (left, top), (width, height), text, color in zip(
        place_labels(boxes, sizes, size), sizes, texts, colors, strict=True
    ):
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color, outline="black")
        is_light = np.dot(color, (0.299, 0.587, 0.114)) > 128
        anchor = left + 2, top + height // 2
        draw.text(anchor, text, fill="black" if is_light else "white", font=font(font_size), anchor="lm")


def place_labels(boxes: np.ndarray, sizes: Sequence[Size], frame: Size) -> list[tuple[int, int]]:
    """Return left and top of each label: inside the frame, clear of other labels and of boxes as far as possible.

    A label stands on its box, else below, beside or inside it, else at another height of the same column. Of these
    places it takes the one with the least cost, in pixels of area: ten for one that another label covers, one for each
    box that the label covers, and a strip of the label's height for its distance from its box.

    Args:
        boxes: (D, 4), x1 y1 x2 y2 in pixels.
        sizes: width and height of each label.
        frame: width and height of the image.
    """
    labels = np.zeros((0, 4))
    for (x1, y1, x2, y2), (width, height) in zip(boxes.tolist(), sizes, strict=True):
        tops = [y1 - height - 1, y2 + 1, y1, y2 - height, *range(0, max(1, frame[1] - height), height)]
        corners = np.array([(left, top) for top in tops for left in (x1, x2 - width, x2 + 1, x1 - width - 1)])
        corners = corners.clip(0, np.maximum(0, np.array(frame) - (width, height))).round()  # (candidates, 2)
        places = np.hstack((corners, corners + np.array([width, height])))  # (candidates, 4)
        distances = np.maximum(places[:, :2] - (x2, y2), (x1, y1) - places[:, 2:]).clip(0).sum(axis=1)
        costs = 10 * covered(places, labels) + covered(places, boxes) + height * distances
        labels = np.concatenate((labels, places[costs.argmin()][None]))  # the first of equals
    return [(int(left), int(top)) for left, top, _, _ in labels]


def covered(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the area (P,) of each place (P, 4) that boxes (D, 4) cover, the more often the more."""
    sides = np.minimum(places[:, None, 2:], boxes[:, 2:]) - np.maximum(places[:, None, :2], boxes[:, :2])  # (P, D, 2)
    return sides.clip(0).prod(axis=2).sum(axis=1)


def save_image(image: np.ndarray, path: Path) -> None:
    """Write an image (H, W, 3) uint8, RGB, as PNG or JPEG by the file's suffix."""
    written, content = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert written
    path.write_bytes(content.tobytes())


def save_comparison(
    rows: Sequence[tuple[np.ndarray, LabeledObjects, LabeledObjects]], path: Path, *, title: str = ""
) -> None:
    """Write a sheet of pairs: ground truth, and prediction.

    Args:
        rows: (image (H, W, 3) uint8, truth, detections) of each pair.
        path: file of the sheet.
        title: of the sheet.
    """
    examples = []
    for image, truth, detections in rows:
        pair = {"ground truth": truth, "prediction": detections}
        tiles = [Tile(heading, partial(draw_objects, image, objects)) for heading, objects in pair.items()]
        examples.append(Example((image.shape[1], image.shape[0]), tiles))
    save_sheet(examples, path, row_height=ROW_HEIGHT, title=title)

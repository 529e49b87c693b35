"""Images with detections drawn on them, next to the ground truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from faster_coco_eval import mask as rle
from matplotlib import colormaps, font_manager
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from utils.logs.plots import drawable

MIN_SIDE = 256  # of a drawing, in pixels; smaller images are enlarged by a whole factor
GAP = 8  # pixels between drawings


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


def draw_objects(image: np.ndarray, objects: LabeledObjects) -> np.ndarray:
    """Return an image (H, W, 3) uint8 with its objects' boxes, masks and captions, enlarged if it is small."""
    factor = -(-MIN_SIDE // min(image.shape[:2])) if min(image.shape[:2]) < MIN_SIDE else 1
    size = image.shape[1] * factor, image.shape[0] * factor
    drawing = torch.from_numpy(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)).permute(2, 0, 1)  # (3, H, W)
    if not len(objects.labels):
        return drawing.permute(1, 2, 0).numpy()
    palette = colormaps["tab10"].colors  # type: ignore[attr-defined]
    colors = [tuple(int(255 * part) for part in palette[label % len(palette)]) for label in objects.labels]
    masks = torch.from_numpy(objects.masks).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    for mask, color in zip(masks.flip(0), colors[::-1], strict=True):  # one by one, so that all show where they overlap
        drawing = draw_segmentation_masks(drawing, mask, alpha=0.4, colors=color)
    drawing = draw_bounding_boxes(
        drawing,
        torch.from_numpy(objects.boxes * factor),
        labels=[drawable(caption) for caption in objects.captions],
        colors=colors,
        width=max(2, min(size) // 250),
        font=font_manager.findfont("DejaVu Sans"),
        font_size=max(14, min(size) // 22),
    )
    return drawing.permute(1, 2, 0).numpy()


def save_image(image: np.ndarray, path: Path) -> None:
    """Write an image (H, W, 3) uint8, RGB, as PNG or JPEG by the file's suffix."""
    written, content = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert written
    path.write_bytes(content.tobytes())


def save_comparison(
    rows: Sequence[tuple[np.ndarray, LabeledObjects, LabeledObjects]], path: Path, *, columns: int = 3
) -> None:
    """Write a grid of pairs: the ground truth on the left, the detections on the right.

    Args:
        rows: (image (H, W, 3) uint8, truth, detections) of each pair.
        path: file of the grid.
        columns: pairs side by side.
    """
    pairs = []
    for image, truth, detections in rows:
        left, right = draw_objects(image, truth), draw_objects(image, detections)
        gap = np.full((left.shape[0], GAP, 3), 255, dtype=np.uint8)
        pairs.append(np.concatenate((left, gap, right), axis=1))
    height = max(pair.shape[0] for pair in pairs) + 2 * GAP
    width = max(pair.shape[1] for pair in pairs) + 4 * GAP
    lines = -(-len(pairs) // columns)
    grid = np.full((lines * height, columns * width, 3), 255, dtype=np.uint8)
    for number, pair in enumerate(pairs):
        top, left = number // columns * height + GAP, number % columns * width + 2 * GAP
        grid[top : top + pair.shape[0], left : left + pair.shape[1]] = pair
    save_image(grid, path)

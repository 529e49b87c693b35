"""Images of the demonstration: colored shapes that occlude each other, on crops of photographs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from faster_coco_eval import mask as rle

# Ids have gaps, as in COCO.
CATEGORIES = {"circle": 1, "square": 3, "triangle": 4, "star": 7}
SIZES = ((128, 160), (160, 128))  # height, width
FINE = 4  # subpixels along a side, for smooth outlines
MIN_VISIBLE = 0.4  # share of an object's area that others may not cover
MAX_OBJECTS = 6
TILT = 0.5  # largest rotation to either side, radians
CROWD_SHARE, EMPTY_SHARE = 0.06, 0.05  # of images


@dataclass
class Shape:
    """An object on an image.

    Attributes:
        name: its category.
        outline: (K, 2), x y in pixels.
        visible: (H, W) bool, the pixels that no other object covers.
        area: its pixels before others covered some.
        is_crowd: many small shapes as one object.
    """

    name: str
    outline: np.ndarray
    visible: np.ndarray
    area: int
    is_crowd: bool = False


def outline_of(name: str, *, center: Sequence[float], radius: float, angle: float) -> np.ndarray:
    """Return a shape's corners (K, 2), x y, `radius` pixels around its center, rotated by `angle` radians."""
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angles = angle + math.pi / (4 if name == "square" else -2) + np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, 0.45 * radius, radius) if name == "star" else np.full(corners, radius)
    return np.stack((center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)), axis=1)


def coverage(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the share of each pixel that lies within an outline, (height, width) from 0 to 1."""
    fine = np.zeros((height * FINE, width * FINE), dtype=np.uint8)
    cv2.fillPoly(fine, [np.round(outline * FINE - 0.5).astype(np.int32)], 255)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def paint(image: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> None:
    """Blend a random shaded color into an image (H, W, 3) float32, 0 to 255, with weights `share` (H, W)."""
    angle = rng.random() * 2 * math.pi
    hsv = np.array([[rng.integers(low, high) for low, high in ((0, 180), (140, 256), (120, 256))]], dtype=np.uint8)
    color = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0, 0]
    ys, xs = np.mgrid[: share.shape[0], : share.shape[1]]
    shade = 0.8 + 0.003 * (np.cos(angle) * xs + np.sin(angle) * ys) + rng.normal(0, 0.03, share.shape)
    painted = color.astype(np.float32) * shade[..., None].astype(np.float32)
    image[:] = image * (1 - share[..., None]) + painted * share[..., None]


def background(photograph: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random crop of a photograph (H, W, 3), resized and darkened: (height, width, 3) float32."""
    scale = rng.uniform(1.0, min(photograph.shape[0] / height, photograph.shape[1] / width))
    part = int(height * scale), int(width * scale)
    top, left = (int(rng.integers(side - own + 1)) for side, own in zip(photograph.shape, part, strict=False))
    piece = photograph[top : top + part[0], left : left + part[1]]
    piece = cv2.resize(piece[:, :: rng.choice([-1, 1])], (width, height), interpolation=cv2.INTER_AREA)
    return piece.astype(np.float32) * rng.uniform(0.5, 1.0)


def draw_image(photograph: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[Shape]]:
    """Return an image (H, W, 3) uint8 and its objects: shapes, sometimes a crowd of them, sometimes none."""
    height, width = SIZES[rng.integers(len(SIZES))]
    image = background(photograph, height, width, rng)
    shapes: list[Shape] = []
    kind = rng.random()
    count = 0 if kind < EMPTY_SHARE else int(rng.integers(1, MAX_OBJECTS + 1))
    if EMPTY_SHARE <= kind < EMPTY_SHARE + CROWD_SHARE:
        shapes.append(draw_crowd(image, rng))
    for _ in range(count):
        draw_object(image, shapes, rng)
    return image.clip(0, 255).astype(np.uint8), shapes


def draw_object(image: np.ndarray, shapes: list[Shape], rng: np.random.Generator) -> None:
    """Draw a shape over the others, unless it would cover too much of one of them."""
    height, width = image.shape[:2]
    name = str(rng.choice(list(CATEGORIES)))
    radius = float(np.exp(rng.uniform(math.log(9), math.log(34))))
    center = rng.uniform(0, width), rng.uniform(0, height)
    outline = outline_of(name, center=center, radius=radius, angle=rng.uniform(-TILT, TILT))
    share = coverage(outline, height, width)
    pixels = share >= 0.5
    whole = abs(cv2.contourArea(outline.astype(np.float32)))
    leaves = [(other.visible & ~pixels).sum() for other in shapes]
    if pixels.sum() < 0.6 * whole or any(
        left < MIN_VISIBLE * other.area for left, other in zip(leaves, shapes, strict=True)
    ):
        return
    for other in shapes:
        other.visible &= ~pixels
    paint(image, share, rng)
    shapes.append(Shape(name, outline, pixels, int(pixels.sum())))


def draw_crowd(image: np.ndarray, rng: np.random.Generator) -> Shape:
    """Draw many small shapes of one kind, too close to tell apart, and return them as one object."""
    height, width = image.shape[:2]
    name = str(rng.choice(list(CATEGORIES)))
    center = np.array([rng.uniform(30, width - 30), rng.uniform(30, height - 30)])
    pixels = np.zeros((height, width), dtype=bool)
    for _ in range(25):
        position = (center + rng.normal(0, 11, 2)).tolist()
        share = coverage(outline_of(name, center=position, radius=5, angle=rng.uniform(-TILT, TILT)), height, width)
        paint(image, share, rng)
        pixels |= share >= 0.5
    return Shape(name, np.zeros((0, 2)), pixels, int(pixels.sum()), is_crowd=True)


def annotation_of(shape: Shape) -> dict[str, Any]:
    """Return an object in COCO's format: a polygon if all of it is visible, else RLE, uncompressed for crowds."""
    encoded = rle.encode(np.asfortranarray(shape.visible.astype(np.uint8)))
    segmentation: Any = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    height, width = shape.visible.shape
    is_inside = (shape.outline >= 0).all() and (shape.outline <= [width, height]).all()
    if shape.is_crowd:
        segmentation = {"size": [height, width], "counts": run_lengths(shape.visible)}
    elif shape.visible.sum() == shape.area and is_inside:
        segmentation = [shape.outline.round(2).flatten().tolist()]
    return {
        "category_id": CATEGORIES[shape.name],
        "bbox": [float(value) for value in rle.toBbox(encoded)],
        "area": float(rle.area(encoded)),
        "iscrowd": int(shape.is_crowd),
        "segmentation": segmentation,
    }


def run_lengths(pixels: np.ndarray) -> list[int]:
    """Return COCO's uncompressed run lengths: column by column, starting with pixels outside."""
    flat = pixels.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate(([0], ends, [len(flat)]))).tolist()
    return [0, *lengths] if flat[0] else lengths

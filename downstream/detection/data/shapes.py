"""A small data set to see the detector learn: colored shapes that hide each other, on pieces of photographs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from faster_coco_eval import mask as rle

# Ids with gaps, as COCO's have them.
CATEGORIES = {"circle": 1, "square": 3, "triangle": 4, "star": 7}
SIZES = ((128, 160), (160, 128))  # height, width
FINE = 4  # subpixels along a side, for smooth outlines
SMALLEST_VISIBLE = 0.4  # share of an object's area that others leave free
MAX_OBJECTS = 6
TILT = 0.5  # radians at most, to either side
CROWD_SHARE, EMPTY_SHARE = 0.06, 0.05  # of images


@dataclass
class Drawn:
    """An object on an image: its name, its outline (K, 2) in pixels x y, and its pixels (H, W) that are seen."""

    name: str
    outline: np.ndarray
    visible: np.ndarray
    area: int
    is_crowd: bool = False


def outline_of(name: str, *, center: Sequence[float], radius: float, angle: float) -> np.ndarray:
    """A shape's corners (K, 2), x y, around its center at `radius` pixels, turned by `angle` radians from upright."""
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angles = angle + math.pi / (4 if name == "square" else -2) + np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, 0.45 * radius, radius) if name == "star" else np.full(corners, radius)
    return np.stack((center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)), axis=1)


def coverage(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """The share of each pixel that lies within an outline, (height, width) from 0 to 1."""
    fine = np.zeros((height * FINE, width * FINE), dtype=np.uint8)
    cv2.fillPoly(fine, [np.round(outline * FINE - 0.5).astype(np.int32)], 255)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def paint(image: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> None:
    """Cover an image (H, W, 3) float32, 0 to 255, where share (H, W) says, with a color that brightens to one side."""
    turn = rng.random() * 2 * math.pi
    hsv = np.array([[rng.integers(low, high) for low, high in ((0, 180), (140, 256), (120, 256))]], dtype=np.uint8)
    color = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0, 0]
    ys, xs = np.mgrid[: share.shape[0], : share.shape[1]]
    shade = 0.8 + 0.003 * (np.cos(turn) * xs + np.sin(turn) * ys) + rng.normal(0, 0.03, share.shape)
    painted = color.astype(np.float32) * shade[..., None].astype(np.float32)
    image[:] = image * (1 - share[..., None]) + painted * share[..., None]


def background(photograph: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A piece of a photograph (H, W, 3), of random size, place and brightness: (height, width, 3) float32."""
    scale = rng.uniform(1.0, min(photograph.shape[0] / height, photograph.shape[1] / width))
    part = int(height * scale), int(width * scale)
    top, left = (int(rng.integers(side - own + 1)) for side, own in zip(photograph.shape, part, strict=False))
    piece = photograph[top : top + part[0], left : left + part[1]]
    piece = cv2.resize(piece[:, :: rng.choice([-1, 1])], (width, height), interpolation=cv2.INTER_AREA)
    return piece.astype(np.float32) * rng.uniform(0.5, 1.0)


def draw_image(photograph: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[Drawn]]:
    """An image (H, W, 3) uint8 and what is on it: some shapes, sometimes a crowd of small ones, sometimes nothing."""
    height, width = SIZES[rng.integers(len(SIZES))]
    image = background(photograph, height, width, rng)
    drawn: list[Drawn] = []
    kind = rng.random()
    count = 0 if kind < EMPTY_SHARE else int(rng.integers(1, MAX_OBJECTS + 1))
    if EMPTY_SHARE <= kind < EMPTY_SHARE + CROWD_SHARE:
        drawn.append(draw_crowd(image, rng))
    for _ in range(count):
        draw_object(image, drawn, rng)
    return image.clip(0, 255).astype(np.uint8), drawn


def draw_object(image: np.ndarray, drawn: list[Drawn], rng: np.random.Generator) -> None:
    """Add a shape on top of those before it, unless it would hide one of them too much."""
    height, width = image.shape[:2]
    name = str(rng.choice(list(CATEGORIES)))
    radius = float(np.exp(rng.uniform(math.log(9), math.log(34))))
    center = rng.uniform(0, width), rng.uniform(0, height)
    outline = outline_of(name, center=center, radius=radius, angle=rng.uniform(-TILT, TILT))
    share = coverage(outline, height, width)
    pixels = share >= 0.5
    whole = abs(cv2.contourArea(outline.astype(np.float32)))
    leaves = [(other.visible & ~pixels).sum() for other in drawn]
    if pixels.sum() < 0.6 * whole or any(
        left < SMALLEST_VISIBLE * other.area for left, other in zip(leaves, drawn, strict=True)
    ):
        return
    for other in drawn:
        other.visible &= ~pixels
    paint(image, share, rng)
    drawn.append(Drawn(name, outline, pixels, int(pixels.sum())))


def draw_crowd(image: np.ndarray, rng: np.random.Generator) -> Drawn:
    """A heap of small shapes of one kind, too many to tell apart, as one object."""
    height, width = image.shape[:2]
    name = str(rng.choice(list(CATEGORIES)))
    center = np.array([rng.uniform(30, width - 30), rng.uniform(30, height - 30)])
    pixels = np.zeros((height, width), dtype=bool)
    for _ in range(25):
        place = (center + rng.normal(0, 11, 2)).tolist()
        share = coverage(outline_of(name, center=place, radius=5, angle=rng.uniform(-TILT, TILT)), height, width)
        paint(image, share, rng)
        pixels |= share >= 0.5
    return Drawn(name, np.zeros((0, 2)), pixels, int(pixels.sum()), is_crowd=True)


def annotation_of(drawn: Drawn) -> dict[str, Any]:
    """An object in COCO's format: polygons where all of it is seen, run lengths where not, uncompressed for crowds."""
    encoded = rle.encode(np.asfortranarray(drawn.visible.astype(np.uint8)))
    segmentation: Any = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    height, width = drawn.visible.shape
    is_inside = (drawn.outline >= 0).all() and (drawn.outline <= [width, height]).all()
    if drawn.is_crowd:
        segmentation = {"size": [height, width], "counts": run_lengths(drawn.visible)}
    elif drawn.visible.sum() == drawn.area and is_inside:
        segmentation = [drawn.outline.round(2).flatten().tolist()]
    return {
        "category_id": CATEGORIES[drawn.name],
        "bbox": [float(value) for value in rle.toBbox(encoded)],
        "area": float(rle.area(encoded)),
        "iscrowd": int(drawn.is_crowd),
        "segmentation": segmentation,
    }


def run_lengths(pixels: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, of pixels outside and inside in turn."""
    flat = pixels.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate(([0], ends, [len(flat)]))).tolist()
    return [0, *lengths] if flat[0] else lengths

"""Images of the demonstration: textured shapes on textured backgrounds, with exact masks."""

import colorsys
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
TEXTURES = ("stripes", "checks", "dots", "clouds", "plain")  # of each shape
HUE_SPREAD = 0.12  # of the color circle, to both sides of a shape's hue; neighbors are 0.2 apart
MIN_VISIBLE = 0.4  # share of a shape that others may not cover
TRIES = 20


class Scene(NamedTuple):
    """An image and its shapes, from back to front.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        labels: N indices into SHAPES.
        masks: (N, H, W) bool, the visible part of each; no two overlap.
    """

    image: np.ndarray
    labels: list[int]
    masks: np.ndarray


def render_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    num_shapes: tuple[int, int] = (2, 5),
    radius: tuple[float, float] = (0.12, 0.3),
) -> Scene:
    """Draw shapes of random kind, position, size and angle.

    Each kind has its own texture, and colors around its own hue, which overlap with those of its neighbors. A
    background has any texture, and grayer colors.

    Args:
        rng: source of all randomness.
        height, width: size of the image, pixels.
        num_shapes: smallest and largest number of shapes; fewer if there is no room.
        radius: smallest and largest radius, as a share of the shorter side.
    """
    gray = rng.uniform(0.25, 0.75) + rng.uniform(-0.1, 0.1, size=3)
    image = texture(rng, str(rng.choice(TEXTURES)), height, width, gray, (gray + rng.uniform(-0.2, 0.2)).clip(0, 1))
    labels: list[int] = []
    full: list[np.ndarray] = []  # masks as if nothing were in front
    visible: list[np.ndarray] = []
    wanted = int(rng.integers(num_shapes[0], num_shapes[1] + 1))
    for _ in range(TRIES):
        if len(labels) == wanted:
            break
        label = int(rng.integers(len(SHAPES)))
        mask = shape_mask(rng, label, height, width, min(height, width) * rng.uniform(*radius))
        left = [seen & ~mask for seen in visible]
        if any(seen.sum() < MIN_VISIBLE * whole.sum() for seen, whole in zip(left, full, strict=True)):
            continue
        hue = label / len(SHAPES) + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
        color = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 1), rng.uniform(0.6, 1)))
        painted = texture(rng, TEXTURES[label], height, width, color, color * rng.uniform(0.3, 0.7))
        image = np.where(mask[..., None], painted, image)
        labels, full, visible = [*labels, label], [*full, mask], [*left, mask]
    light = 1 + rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, width)  # from one side
    image = image * light[:, None] + rng.normal(0, 0.03, size=image.shape)
    masks = np.stack(visible) if visible else np.zeros((0, height, width), dtype=bool)
    return Scene((image.clip(0, 1) * 255).round().astype(np.uint8), labels, masks)


def shape_mask(rng: np.random.Generator, label: int, height: int, width: int, radius: float) -> np.ndarray:
    """Return the pixels of a shape, (H, W) bool.

    It fits into a circle of `radius` pixels that lies at most half a radius outside the image.
    """
    inset_y, inset_x = min(radius / 2, height / 2), min(radius / 2, width / 2)
    center_y, center_x = rng.uniform(inset_y, height - inset_y), rng.uniform(inset_x, width - inset_x)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.mgrid[:height, :width] + 0.5 - np.array([center_y, center_x])[:, None, None]) / radius
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    distance, direction = np.hypot(x, y), np.arctan2(y, x)
    name = SHAPES[label]
    if name == "circle":
        return distance < 0.9
    if name == "square":
        return np.maximum(abs(x), abs(y)) < 0.7
    if name == "triangle":
        return np.maximum.reduce([-y, (y + 3**0.5 * x) / 2, (y - 3**0.5 * x) / 2]) < 0.5
    if name == "star":  # five points, straight edges from radius 1 to radius 0.4
        turn = abs((direction * 5 / (2 * np.pi)) % 1 - 0.5) * 2 * np.pi / 5  # 0 at a notch, 36 degrees at a point
        step = np.pi / 5
        edge = 0.4 * np.sin(step) / (np.sin(step - turn) + 0.4 * np.sin(turn))
        return distance < edge
    return (np.minimum(abs(x), abs(y)) < 0.27) & (np.maximum(abs(x), abs(y)) < 0.9)  # a cross


def texture(
    rng: np.random.Generator, name: str, height: int, width: int, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Return two colors (3,) in a pattern of random period and angle, (H, W, 3) from 0 to 1."""
    period, angle = rng.uniform(5, 16), rng.uniform(0, np.pi)
    y, x = np.mgrid[:height, :width] * (2 * np.pi / period)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    share = np.zeros((height, width))  # of the second color
    if name == "stripes":
        share = np.sin(along) > 0
    elif name == "checks":
        share = np.sin(along) * np.sin(across) > 0
    elif name == "dots":
        share = np.sin(along) + np.sin(across) > 0.9
    elif name == "clouds":
        waves = rng.uniform(0.1, 0.8, size=(4, 3)) * [1, 1, 8]
        share = sum(np.sin(a * along + b * across + c) for a, b, c in waves) / 8 + 0.5
    return first + (second - first) * np.asarray(share, dtype=float)[..., None]

"""Masks as palette PNGs, overlays, and sheets of predictions next to the ground truth."""

import colorsys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from downstream.segmentation.model.losses import IGNORED
from utils.logs.contact_sheet import Example, Tile, resized, save_sheet

PREDICTION_ENDINGS = (".png", "_overlay.jpg")  # of mask and overlay
GOLDEN_RATIO = (5**0.5 - 1) / 2
LEGEND_CLASSES = 40  # of the classes that are there, the first ones
ROW_HEIGHT = 190  # of the images on a sheet


def class_colors(num_classes: int) -> np.ndarray:
    """Return RGB colors (256, 3), uint8: a different one for each class, far apart for neighbors; the rest black."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    for i in range(num_classes):
        hue, ring = i * GOLDEN_RATIO % 1, i % 3
        colors[i] = np.round(255 * np.array(colorsys.hsv_to_rgb(hue, (0.85, 0.6, 0.9)[ring], (0.95, 0.8, 0.6)[ring])))
    return colors


def save_mask(path: Path, classes: np.ndarray, num_classes: int, *, first_label: int = 0) -> None:
    """Write class indices (H, W), uint8, as a palette PNG in the dataset's own numbers.

    Args:
        first_label: number of the first class in the file: 1 where 0 means that a pixel has no class.
    """
    colors = np.roll(class_colors(num_classes), first_label, axis=0)
    ignored = classes == IGNORED
    mask = Image.fromarray(np.where(ignored, classes, classes + first_label).astype(np.uint8))
    mask.putpalette(colors.tobytes())
    mask.save(path)


def prediction_files(path: Path) -> tuple[Path, Path]:
    """Return the paths of mask and overlay, <path>.png and <path>_overlay.jpg."""
    mask, overlay = (path.with_name(path.name + ending) for ending in PREDICTION_ENDINGS)
    return mask, overlay


def save_prediction(
    path: Path, image: np.ndarray, classes: np.ndarray, *, num_classes: int, first_label: int = 0
) -> None:
    """Write the predicted classes (H, W), uint8, of an image (H, W, 3) as a mask, and an overlay on the image.

    Args:
        path: of the results without their endings, see `prediction_files`; its folder is made.
        first_label: see `save_mask`.
    """
    mask_path, overlay_path = prediction_files(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_mask(mask_path, classes, num_classes, first_label=first_label)
    Image.fromarray(overlay(image, classes, num_classes)).save(overlay_path)


def overlay(image: np.ndarray, classes: np.ndarray, num_classes: int, *, opacity: float = 0.6) -> np.ndarray:
    """Return an image (H, W, 3) in gray, colored by its pixels' classes (H, W), with lines between classes, uint8.

    Pixels without a class keep the image's colors.
    """
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    mixed = gray * (1 - opacity) + class_colors(num_classes)[classes] * opacity
    mixed[classes == IGNORED] = image[classes == IGNORED]
    borders = cv2.morphologyEx(classes, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
    mixed[borders] = 255
    return mixed.round().astype(np.uint8)


def save_comparison(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path, *, classes: Sequence[str], title: str = ""
) -> None:
    """Write a sheet of images with overlays of ground truth and prediction.

    The caption of a prediction has the share of labeled pixels that are right.

    Args:
        rows: (image (H, W, 3) uint8, true classes (H, W), predicted classes (H, W)) of each example.
        path: file of the sheet.
        classes: names.
        title: of the sheet.
    """
    examples = []
    for image, truth, prediction in rows:
        labeled = truth != IGNORED
        right = f", {(prediction == truth)[labeled].mean():.1%} right" if labeled.any() else ""
        panels = {"image": image, "ground truth": overlay(image, truth, len(classes))}
        panels[f"prediction{right}"] = overlay(image, prediction, len(classes))
        tiles = [Tile(heading, partial(resized, panel)) for heading, panel in panels.items()]
        examples.append(Example((image.shape[1], image.shape[0]), tiles))
    present = sorted({i for row in rows for masks in row[1:] for i in np.unique(masks).tolist() if i < len(classes)})
    legend = [(classes[i], tuple(class_colors(len(classes))[i].tolist())) for i in present[:LEGEND_CLASSES]]
    save_sheet(examples, path, row_height=ROW_HEIGHT, title=title, legend=legend)

"""Masks as palette PNGs, overlays, and plots of predictions next to the ground truth."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image

from downstream.segmentation.model.losses import IGNORED
from utils.logs.plots import drawable

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

GOLDEN_RATIO = (5**0.5 - 1) / 2
LEGEND_CLASSES = 20  # more do not fit below a plot


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
    return path.with_name(path.name + ".png"), path.with_name(path.name + "_overlay.jpg")


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


def plot_segmentations(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    *,
    classes: Sequence[str],
    picture: Path,
) -> None:
    """Plot images (H, W, 3) with overlays of their true and predicted classes (H, W), two images per row.

    The title of a prediction is the share of labeled pixels that are right.
    """
    rows = -(-len(images) // 2)
    figure, axes = plt.subplots(rows, 6, figsize=(13, 2.35 * rows + 0.4), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for i, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        labeled = truth != IGNORED
        right = (prediction == truth)[labeled].mean() if labeled.any() else np.nan
        panels = {"image": image, "truth": overlay(image, truth, len(classes))}
        panels[f"predicted, {right:.1%} right"] = overlay(image, prediction, len(classes))
        for axis, (title, shown) in zip(axes[i // 2, i % 2 * 3 :], panels.items(), strict=False):
            axis.imshow(shown)
            axis.set_title(title, fontsize=9)
    present = [i for i in np.unique(np.concatenate([x.ravel() for x in [*truths, *predictions]])) if i < len(classes)]
    if len(present) <= LEGEND_CLASSES:
        colors = class_colors(len(classes)) / 255
        patches = [Patch(color=colors[i], label=drawable(classes[i]).replace("$", r"\$")) for i in present]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 8), frameon=False)
    figure.savefig(picture, dpi=75, bbox_inches="tight")
    plt.close(figure)

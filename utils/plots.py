"""Pictures of a run: its curves, and what it predicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Panel(NamedTuple):
    """One diagram: its title, and what each curve is called, by its name in metrics.jsonl."""

    title: str
    curves: Mapping[str, str]


STEP_PANELS = (
    Panel("learning rate", {"lr": "learning rate"}),
    Panel("gradient norm before clipping, mean of the epoch", {"grad_norm": "gradient norm"}),
)
CLASSIFIER_PANELS = (
    Panel("loss", {"train_loss": "training, all terms", "loss": "validation"}),
    Panel("validation top-1 accuracy, %", {"acc1": "model", "ema_acc1": "EMA"}),
    *STEP_PANELS,
)


def plot_curves(records: list[dict[str, Any]], panels: Sequence[Panel], picture: Path) -> None:
    """Draw figures by epoch from the records of metrics.jsonl, two panels a row; curves without values are left out."""
    epochs = [record["epoch"] + 1 for record in records]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.5 * rows), squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for name, label in panel.curves.items():
            values = [np.nan if record.get(name) is None else record[name] for record in records]
            if not np.all(np.isnan(values)):
                axis.plot(epochs, values, label=label, marker="o" if len(epochs) < 3 else None)
        axis.set_title(panel.title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if len(panel.curves) > 1:
            axis.legend()
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_predictions(
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    labels: list[str],
    predictions: list[str],
    confidences: list[float],
    picture: Path,
) -> None:
    """Draw a grid of images with their true and predicted classes; mistakes in red.

    Args:
        images: (H, W, 3) each, from 0 to 1.
        labels, predictions: class names, N each.
        confidences: probability of the predicted class, N.
    """
    captions = [
        f"true {label}\npred. {prediction} ({confidence:.0%})"
        for label, prediction, confidence in zip(labels, predictions, confidences, strict=True)
    ]
    colors = ["black" if label == prediction else "red" for label, prediction in zip(labels, predictions, strict=True)]
    plot_grid(images, captions, colors=colors, picture=picture)


def plot_grid(
    images: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    *,
    picture: Path,
    colors: Sequence[str] | None = None,
) -> None:
    """Draw images (H, W, 3), of any sizes, in rows of eight, each below its caption."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.85 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption, color in zip(
        axes.flat, images, captions, colors or ["black"] * len(images), strict=False
    ):
        axis.imshow(image)
        axis.set_title(caption, fontsize=8, color=color, parse_math=False)  # a class may be called $
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_bars(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    highlighted: Sequence[bool],
    axis_label: str,
    title: str,
    picture: Path,
) -> None:
    """Draw a horizontal bar for each value, from the top down, with its figure at its end."""
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.36 * len(values)), layout="constrained")
    bars = axis.barh(range(len(values)), values, color=["tab:blue" if h else "tab:gray" for h in highlighted])
    axis.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=3)
    axis.set_yticks(range(len(values)), labels)
    axis.invert_yaxis()
    axis.margins(x=0.14)
    axis.set_xlabel(axis_label)
    axis.set_title(title, fontsize=10)
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)

"""Pictures of a run: its curves, and what it predicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_curves(records: list[dict[str, Any]], picture: Path) -> None:
    """Draw loss, accuracy, learning rate and gradient norm by epoch from the records of metrics.jsonl."""
    epochs = [record["epoch"] + 1 for record in records]

    def draw(axis: plt.Axes, names: dict[str, str], title: str) -> None:
        for name, label in names.items():
            values = [record[name] if record[name] is not None else np.nan for record in records]
            if not np.all(np.isnan(values)):
                axis.plot(epochs, values, label=label, marker="o" if len(epochs) < 3 else None)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    draw(axes[0, 0], {"train_loss": "training, all terms", "loss": "validation"}, "loss")
    draw(axes[0, 1], {"acc1": "model", "ema_acc1": "EMA"}, "validation top-1 accuracy, %")
    draw(axes[1, 0], {"lr": "learning rate"}, "learning rate")
    draw(axes[1, 1], {"grad_norm": "gradient norm"}, "gradient norm before clipping, mean of the epoch")
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_predictions(
    images: np.ndarray, *, labels: list[str], predictions: list[str], confidences: list[float], picture: Path
) -> None:
    """Draw a grid of images with their true and predicted classes; mistakes in red.

    Args:
        images: (N, H, W, 3), from 0 to 1.
        labels, predictions: class names, N each.
        confidences: probability of the predicted class, N.
    """
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.85 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label, prediction, confidence in zip(
        axes.flat, images, labels, predictions, confidences, strict=False
    ):
        axis.imshow(image)
        axis.set_title(
            f"true {label}\npred. {prediction} ({confidence:.0%})",
            fontsize=8,
            color="black" if label == prediction else "red",
            parse_math=False,  # a class may be called $
        )
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_ablation(
    labels: Sequence[str],
    *,
    paper: Sequence[float],
    scores: Sequence[Sequence[float]],
    title: str,
    picture: Path,
) -> None:
    """Draw the rows of an ablation, from top to bottom: the paper's accuracies, and ours with each seed as a dot.

    Args:
        labels: names of the rows.
        paper: top-1 accuracy of each row, per cent.
        scores: top-1 accuracies of each row by seed, per cent.
        title: what ours were trained on.
    """
    places = np.arange(len(labels))
    means = [float(np.mean(values)) for values in scores]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.38 * len(labels) + 1.4), sharey=True, layout="constrained")
    for axis, values, name in ((axes[0], paper, "the paper: ImageNet-1K, 300 epochs"), (axes[1], means, title)):
        axis.axvline(values[0], color="0.6", linestyle="--", linewidth=1)
        axis.hlines(places, values[0], values, color="tab:blue", alpha=0.4, linewidth=4)
        axis.plot(values, places, "o", color="tab:blue")
        axis.set_title(name)
        axis.set_xlabel("top-1 accuracy, %")
        axis.grid(alpha=0.3)
    for place, values in zip(places, scores, strict=True):
        axes[1].plot(values, [place] * len(values), ".", color="black", markersize=4)
        if len(values) > 1:
            axes[1].errorbar(np.mean(values), place, xerr=np.std(values, ddof=1), color="tab:blue", capsize=3)
    axes[0].set_yticks(places, labels)
    axes[0].invert_yaxis()
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)

"""Pictures of a run: its curves, and what it predicts."""

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

"""Pictures of what the paper claims: its ablations, the speed of the forget gate, and what a model looks at."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


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

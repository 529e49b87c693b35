"""Plots of the paper's claims: ablations, speed of the forget gate, receptive fields and attention."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter


def plot_ablation(
    labels: Sequence[str],
    *,
    paper: Sequence[float],
    scores: Sequence[Sequence[float]],
    title: str,
    picture: Path,
) -> None:
    """Plot the rows of an ablation from top to bottom: the paper's accuracies, and ours with a dot per seed.

    Args:
        labels: names of the rows.
        paper: top-1 accuracy of each row in percent.
        scores: top-1 accuracies of each row by seed in percent.
        title: of our results, for example the dataset.
    """
    positions = np.arange(len(labels))
    means = [float(np.mean(values)) for values in scores]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.38 * len(labels) + 1.4), sharey=True, layout="constrained")
    for axis, values, name in ((axes[0], paper, "the paper: ImageNet-1K, 300 epochs"), (axes[1], means, title)):
        axis.axvline(values[0], color="0.6", linestyle="--", linewidth=1)
        axis.hlines(positions, values[0], values, color="tab:blue", alpha=0.4, linewidth=4)
        axis.plot(values, positions, "o", color="tab:blue")
        axis.set_title(name)
        axis.set_xlabel("top-1 accuracy, %")
        axis.grid(alpha=0.3)
    for position, values in zip(positions, scores, strict=True):
        axes[1].plot(values, [position] * len(values), ".", color="black", markersize=4)
        if len(values) > 1:
            axes[1].errorbar(np.mean(values), position, xerr=np.std(values, ddof=1), color="tab:blue", capsize=3)
    axes[0].set_yticks(positions, labels)
    axes[0].invert_yaxis()
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_pairs(
    labels: Sequence[str],
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    names: tuple[str, str],
    title: str,
    picture: Path,
) -> None:
    """Plot two groups of accuracies in percent per label, with a dot per seed, the mean and the standard deviation."""
    figure, axis = plt.subplots(figsize=(1.4 * len(labels) + 2, 4), layout="constrained")
    for offset, color, name, groups in ((-0.12, "0.4", names[0], first), (0.12, "tab:blue", names[1], second)):
        for position, values in enumerate(groups):
            axis.plot([position + offset] * len(values), values, ".", color=color, markersize=4, alpha=0.6)
            axis.errorbar(
                position + offset,
                np.mean(values),
                yerr=np.std(values, ddof=1) if len(values) > 1 else 0,
                fmt="o",
                color=color,
                capsize=3,
                label=name if position == 0 else None,
            )
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel("top-1 accuracy, %")
    axis.set_title(title)
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_maps(
    images: np.ndarray,
    columns: Sequence[tuple[str, np.ndarray]],
    *,
    title: str,
    picture: Path,
    mark: tuple[float, float] | None = None,
) -> None:
    """Plot one image per row with its maps beside it, each map with a color bar of its own range.

    Args:
        images: (B, H, W, 3), from 0 to 1.
        columns: name and maps (B, h, w) of each column; any h and w.
        title: of the whole figure.
        mark: position to mark in every panel, (down, right) as fractions of the image.
    """
    rows, count = len(images), len(columns) + 1
    figure, axes = plt.subplots(
        rows, count, figsize=(2.4 * count, 2.1 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for i, image in enumerate(images):
        axes[i, 0].imshow(image, extent=(0, 1, 1, 0))
        for axis, (_, maps) in zip(axes[i, 1:], columns, strict=True):
            draw_map(figure, axis, maps[i])
        for axis, shape in zip(axes[i], [image.shape, *(maps[i].shape for _, maps in columns)], strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if mark is not None:  # the center of the cell that contains it
                down, right = ((min(int(m * n), n - 1) + 0.5) / n for m, n in zip(mark, shape, strict=False))
                axis.plot(right, down, "x", color="black", markersize=9, markeredgewidth=4)
                axis.plot(right, down, "x", color="white", markersize=8, markeredgewidth=2)
    for axis, name in zip(axes[0], ["image", *(name for name, _ in columns)], strict=True):
        axis.set_title(name, fontsize=9)
    figure.suptitle(title)
    figure.savefig(picture, dpi=100, bbox_inches="tight")
    plt.close(figure)


def draw_map(figure: Any, axis: Any, values: np.ndarray) -> None:
    """Draw values (h, w) in colors, with a bar of their range: dark to light, or if some are negative blue to red.

    Blue to red has white at zero, so the scale goes as far below as above it; the bar shows the part that is in use.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:  # one token, or equal ones: any range around them
        low, high = low - 0.5, high + 0.5
    limit = max(-low, high)
    colors = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if values.min() < 0 else {"vmin": low, "vmax": high}
    shown = axis.imshow(values, extent=(0, 1, 1, 0), interpolation="nearest", **colors)
    bar = figure.colorbar(shown, ax=axis, shrink=0.85, format=ScalarFormatter(useOffset=False))
    bar.ax.set_ylim(low, high)


def plot_by_depth(
    images: np.ndarray, values: np.ndarray, *, layers: Sequence[str], title: str, label: str, picture: Path
) -> None:
    """Plot values (B, layers) as one curve per image, with the images (B, H, W, 3) beside it."""
    rows = len(images)
    figure = plt.figure(figsize=(9, max(3.5, 1.3 * rows)), layout="constrained")
    grid = figure.add_gridspec(rows, 2, width_ratios=(1, 5))
    chart = figure.add_subplot(grid[:, 1])
    for i, (image, curve) in enumerate(zip(images, values, strict=True)):
        axis = figure.add_subplot(grid[i, 0])
        axis.imshow(image)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(f"{i + 1}", rotation=0, labelpad=10, color=f"C{i % 10}")
        chart.plot(range(len(curve)), curve, "o-", color=f"C{i % 10}", label=f"image {i + 1}", alpha=0.8)
    chart.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    chart.set_ylabel(label)
    chart.grid(alpha=0.3)
    chart.legend()
    figure.suptitle(title)
    figure.savefig(picture, dpi=100, bbox_inches="tight")
    plt.close(figure)


def plot_speed(
    tokens: Sequence[int], times: Mapping[bool, Mapping[str, Sequence[float | None]]], *, title: str, picture: Path
) -> None:
    """Plot seconds by number of tokens on log axes, without and with gradients, with a line of linear cost."""
    figure, axes = plt.subplots(1, len(times), figsize=(5.5 * len(times), 4.5), sharey=True, squeeze=False)
    axes = axes[0]
    for axis, with_gradients in zip(axes, times, strict=True):
        curves = times[with_gradients]
        for name, seconds in curves.items():
            axis.plot(tokens, [np.nan if value is None else 1000 * value for value in seconds], "o-", label=name)
        lowest = min(1000 * value for seconds in curves.values() for value in seconds if value is not None)
        guide = [lowest * count / tokens[0] for count in tokens]
        axis.plot(tokens, guide, "--", color="0.6", label="linear in N")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title("forward and backward" if with_gradients else "forward")
        axis.set_xlabel("tokens N")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("milliseconds")
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 0.0))
    figure.suptitle(title, fontsize=10)
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)

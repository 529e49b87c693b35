"""Plots of a run: its curves, and its speed."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NEAR_100 = 90.0  # best scores from here on, in percent, get an axis of their own range
HIDDEN_SHARE = 0.2  # of the values that such an axis leaves out
BRIGHT = ("#6cb6ff", "#ffb066", "#7ee787", "#ff8f8f", "#d2a8ff", "#e0b08a", "#ffa6d8", "#c0c0c0")  # on dark pages


class Panel(NamedTuple):
    """Title of a plot, and the label of each curve by its name in metrics.jsonl.

    The curves of scores in percent, the higher the better, have their best epoch marked.
    """

    title: str
    curves: Mapping[str, str]
    is_score: bool = False


STEP_PANELS = (
    Panel("learning rate", {"lr": "learning rate"}),
    Panel("gradient norm before clipping, mean of the epoch", {"grad_norm": "gradient norm"}),
)
CLASSIFIER_PANELS = (
    Panel("loss", {"train_loss": "training, all terms", "loss": "validation"}),
    Panel("validation top-1 accuracy, %", {"acc1": "model", "ema_acc1": "EMA"}, is_score=True),
    *STEP_PANELS,
)


def pyplot() -> Any:
    """Return matplotlib's pyplot for drawing to files. Its import takes up to half a second of a run's start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_curves(records: list[dict[str, Any]], panels: Sequence[Panel], path: Path) -> None:
    """Plot metrics by epoch from records of metrics.jsonl, two panels per row; curves without values are left out."""
    figure, axes = grid_of(len(panels), height=3.5)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(panel.title)
        draw_alone(axis, records, panel)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def draw_alone(axis: Any, records: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    """Draw a panel of one run, with a legend where there is more than one curve or a best value to name."""
    if draw_panel(axis, records, panel) and (len(panel.curves) > 1 or panel.is_score):
        axis.legend()
    zoom_near_100(axis, panel)


def grid_of(count: int, *, height: float) -> tuple[Any, list[Any]]:
    """Return a figure and its `count` axes, two per row, each `height` inches high; a last one alone fills its row."""
    rows = -(-count // 2)
    figure = pyplot().figure(figsize=(11, height * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    places = [(i // 2, slice(None) if i == count - 1 and not i % 2 else i % 2) for i in range(count)]
    return figure, [figure.add_subplot(grid[place]) for place in places]


def draw_panel(
    axis: Any, records: Sequence[Mapping[str, Any]], panel: Panel, styles: Sequence[Mapping[str, Any]] = ()
) -> list[Any]:
    """Draw a panel's curves by epoch, in `styles` if given, one per curve, and return the lines."""
    epochs = [record["epoch"] + 1 for record in records]
    lines = []
    for i, (name, label) in enumerate(panel.curves.items()):
        values = [np.nan if record.get(name) is None else record[name] for record in records]
        if not np.all(np.isnan(values)):
            style = {"label": label, "marker": "o" if len(epochs) < 3 else None, **(styles[i] if styles else {})}
            (line,) = axis.plot(epochs, values, **style)
            lines.append(line)
            if panel.is_score:
                mark_best(axis, line)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.grid(alpha=0.3)
    return lines


def mark_best(axis: Any, line: Any) -> None:
    """Mark the highest value of a curve, of equal ones the last as in max_*.pth, and name it in the curve's label."""
    epochs, values = line.get_data()
    best = len(values) - 1 - int(np.nanargmax(values[::-1]))
    axis.plot(epochs[best], values[best], "*", color=line.get_color(), markersize=10, markeredgecolor="black", zorder=3)
    line.set_label(f"{line.get_label()}: best {values[best]:.2f}, epoch {epochs[best]}")


def zoom_near_100(axis: Any, panel: Panel) -> None:
    """Cut the lowest values, of the first epochs, off an axis of scores near 100%, to tell the others apart."""
    if not panel.is_score or not axis.lines:
        return
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    lowest, start, best = np.nanmin(values), np.nanquantile(values, HIDDEN_SHARE), np.nanmax(values)
    if best >= NEAR_100 and best - lowest > 3 * (best - start) > 0:
        margin = 0.08 * (best - start)
        axis.set_ylim(start - margin, best + margin)
        axis.set_ylabel(f"lower values, from {lowest:.1f}, are not shown", fontsize=8)


def panel_svg(records: Sequence[Mapping[str, Any]], panel: Panel, *, dark: bool) -> bytes:
    """Return a panel as an SVG without background and title, for light or dark pages."""
    ink = "#e6e6e6" if dark else "#1a1a1a"
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    # Text stays text; fixed ids, so that the same metrics give the same bytes.
    plt = pyplot()
    colors = plt.cycler(color=BRIGHT) if dark else plt.rcParams["axes.prop_cycle"]
    settings: dict[Any, Any] = {
        "axes.prop_cycle": colors,
        "svg.fonttype": "none",
        "svg.hashsalt": "mlla",
        "legend.framealpha": 0,
    }
    with plt.rc_context(settings | dict.fromkeys(parts, ink)):
        figure, axis = plt.subplots(figsize=(5.2, 3), layout="constrained")
        draw_alone(axis, records, panel)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return buffer.getvalue()


def comparison_plot(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], panels: Sequence[Panel], form: str, *, creator: str
) -> bytes:
    """Return a plot of several runs: one color per run, a panel's first curve solid, others dashed.

    Args:
        runs: records by the run's name.
        form: png, svg or pdf.
        creator: name of the program, written into the file.
    """
    figure, axes = grid_of(len(panels), height=3.2)
    colors = pyplot().get_cmap("tab10" if len(runs) <= 10 else "turbo")
    handles = {}
    for i, (name, records) in enumerate(runs.items()):
        color = colors(i if len(runs) <= 10 else i / (len(runs) - 1))
        for axis, panel in zip(axes, panels, strict=True):
            styles = [{"color": color, "linestyle": "--" if j else "-"} for j in range(len(panel.curves))]
            for line in draw_panel(axis, records, panel, styles)[:1]:
                handles[name] = line
    for axis, panel in zip(axes, panels, strict=True):
        zoom_near_100(axis, panel)
        labels = list(panel.curves.values())
        axis.set_title(panel.title + (f" ({labels[0]}; dashed: {labels[1]})" if len(labels) > 1 else ""), fontsize=11)
    columns = max(1, 120 // (max(map(len, handles), default=0) + 6))
    names = [name.replace("$", r"\$") for name in handles]
    figure.legend(
        handles.values(), names, loc="outside lower center", ncols=max(1, min(columns, len(names))), frameon=False
    )
    buffer = io.BytesIO()
    metadata = {"Software" if form == "png" else "Creator": creator}
    figure.savefig(buffer, format=form, dpi=110, bbox_inches="tight", metadata=metadata)
    pyplot().close(figure)
    return buffer.getvalue()


def plot_grouped_bars(
    labels: Sequence[str], values: Mapping[str, Sequence[float]], *, axis_label: str, title: str, path: Path
) -> None:
    """Plot groups of horizontal bars from the top down: in each a bar per name of `values`, with its value at the end.

    Args:
        labels: a label per group, perhaps of several lines.
        values: a value per group by the name of the bars.
        axis_label: of the values.
        title: above the plot.
        path: of the file.
    """
    height = 0.8 / len(values)
    size = (8, 1.6 + 0.36 * len(values) * len(labels))
    figure, axis = axes_for_bars(labels, size, axis_label=axis_label, title=title)
    for place, (name, row) in enumerate(values.items()):
        bars = axis.barh(np.arange(len(labels)) + (place - (len(values) - 1) / 2) * height, row, height, label=name)
        axis.bar_label(bars, labels=[f"{value:,.0f}" for value in row], padding=3)
    figure.legend(loc="outside lower center", ncols=len(values))
    figure.savefig(path, dpi=100)
    pyplot().close(figure)


def plot_bars(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    colors: Sequence[str],
    axis_label: str,
    title: str,
    path: Path,
) -> None:
    """Plot a horizontal bar per value, from the top down, with the value at its end."""
    figure, axis = axes_for_bars(labels, (9, 1.4 + 0.36 * len(values)), axis_label=axis_label, title=title)
    bars = axis.barh(range(len(values)), values, color=colors)
    axis.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def plot_lines(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, x_label: str, title: str, path: Path
) -> None:
    """Plot curves on logarithmic axes, each a list of (x, y) by name, in a panel per label of the y axis."""
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained"
    )
    for axis, (y_label, curves) in zip(axes[0], panels.items(), strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def axes_for_bars(labels: Sequence[str], size: tuple[float, float], *, axis_label: str, title: str) -> tuple[Any, Any]:
    """Return a figure of a size in inches and its axes, for horizontal bars at 0, 1, ... from the top down."""
    figure, axis = pyplot().subplots(figsize=size, layout="constrained")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.margins(x=0.2)  # for the values
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(axis_label)
    figure.suptitle(title, fontsize=10)
    return figure, axis

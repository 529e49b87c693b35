"""Measurements as tables, and as a bar chart."""

from collections.abc import Sequence
from pathlib import Path

from utils.benchmark.measure import Throughput
from utils.logs.plots import plot_bars


def throughput_table(rows: Sequence[Throughput]) -> str:
    """A heading and the rows, in columns."""
    return in_columns(
        [
            {
                "model": row.model,
                "work": row.work,
                "chip": row.chip,
                "precision": row.precision,
                "compile": row.compile,
                "batch": str(row.batch),
                "size": str(row.size),
                "processes": str(row.processes),
                "img/s": f"{row.images_per_second:.1f}",
                "ms/batch": f"{row.milliseconds_per_batch:.2f}",
                "peak MiB": f"{row.memory_mib:.0f}",
            }
            for row in rows
        ]
    )


def pixel_table(rows: Sequence[Throughput]) -> str:
    """What a pixel costs at several image sizes, and how much of what it costs at the first."""
    costs = [1e6 * row.milliseconds_per_batch / row.batch / row.size**2 for row in rows]
    return in_columns(
        [
            {
                "model": row.model,
                "size": str(row.size),
                "batch": str(row.batch),
                "img/s": f"{row.images_per_second:.1f}",
                "ns/pixel": f"{cost:.3f}",
                f"of {rows[0].size}": f"{cost / costs[0]:.2f}",
            }
            for row, cost in zip(rows, costs, strict=True)
        ]
    )


def in_columns(rows: Sequence[dict[str, str]]) -> str:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    return "\n".join("  ".join(line[name].rjust(width) for name, width in widths.items()) for line in lines)


def draw_bars(rows: Sequence[Throughput], picture: Path) -> None:
    """Images per second of each row, as a bar chart with the figures beside the bars."""
    first = rows[0]
    plot_bars(
        [f"{row.model}, {row.work}, batch {row.batch}, {row.size}x{row.size}" for row in rows],
        [row.images_per_second for row in rows],
        highlighted=[row.model == first.model for row in rows],
        axis_label="images per second",
        title=f"{first.chip}, torch {first.torch}, {first.precision}, {first.layout}, compile {first.compile}",
        path=picture,
    )

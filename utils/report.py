"""A report of a run as one HTML file: python -m utils.report RUN [--output report.html]

RUN is the folder of a run, finished or not: <output>/<MODEL.NAME>/<tag>. The file needs no other and no network. It
holds results, curves, predictions, settings, environment and warnings, for light and dark screens of any width.
"""

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from config import SCHEMA
from downstream.detection import config as detection
from downstream.segmentation import config as segmentation
from utils.config.command_line import Parser, report_user_errors
from utils.config.schema import Schema
from utils.logs.atomic_write import check_replaceable, write_atomic
from utils.logs.logger import read_records
from utils.logs.plots import Panel, panel_svg
from utils.tools.html_page import (
    Picture,
    cards,
    curves,
    figure,
    folded,
    header,
    page,
    paragraph,
    preformatted,
    scrolling,
    section,
    table,
)
from utils.tools.run_history import SHOWN, RunMetrics, extremes, names_in, panels_of, read_run

CREATOR = "MLLA utils.report"
PICTURES = {"predictions.png": "image/png", "predictions.jpg": "image/jpeg"}
MAX_WARNINGS = 30
SVG = "image/svg+xml"


def schema_of(config: Mapping[str, Any]) -> Schema:
    """That of the task whose keys the configuration has."""
    schemas: list[Schema] = [SCHEMA, detection.SCHEMA, segmentation.SCHEMA]
    return min(schemas, key=lambda schema: len(set(config) - set(schema)))


def overview(run: RunMetrics, name: str) -> str:
    """The title, and how far the run is."""
    done, planned = run.records[-1]["epoch"] + 1, run.planned_epochs
    progress = f"epoch {done}" if planned is None else f"{done} of {planned} epochs"
    figures = []
    for key in names_in(run.records):
        kind = key.removeprefix("ema_")
        found = extremes(run.records, key)
        if kind in SHOWN and found and found.best is not None and not kind.endswith("loss"):
            who = f"EMA {kind}" if key.startswith("ema_") else kind
            figures.append((f"best {who}", f"{found.best:.2f}", f"epoch {found.best_epoch}, last {found.last:.2f}"))
    made = f"report of {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    return header(name, paragraph(f"{progress}; {made}"), cards([*figures, *speed_cards(run)]))


def speed_cards(run: RunMetrics) -> Iterator[tuple[str, str, str]]:
    """What training took, as far as speed.jsonl says it."""
    rates = [record["images_per_second"] for record in run.records if "images_per_second" in record]
    if rates:
        rate = statistics.median(rates)
        yield "images a second", f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}", "in training, median of the epochs"
    seconds = [sum(record.get(f"{part}_seconds", 0) for part in ("train", "eval")) for record in run.records]
    if all(seconds):
        waited = sum(record.get("data_wait_seconds", 0) for record in run.records) / sum(seconds)
        yield "time", duration(sum(seconds)), f"training and evaluation; {waited:.0%} of it waiting for data"
    memory = [record["memory_mib"] for record in run.records if "memory_mib" in record]
    if memory:
        yield "memory", f"{max(memory) / 1024:.2f} GiB", "most at once, first process"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def curve_figures(run: RunMetrics) -> Iterator[str]:
    """A figure for each diagram; the losses' one has all their terms."""
    names = names_in(run.records)
    terms = {name: name[6:] for name in names if name.startswith("train_") and not name.endswith("_seconds")}
    for panel in panels_of(names):
        if "train_loss" in panel.curves and len(terms) > 1:
            panel = Panel(panel.title, terms | {"train_loss": "all terms"})
        described = []
        for name, label in panel.curves.items():
            values = [record[name] for record in run.records if name in record]
            described.append(f"{label} from {values[0]:.4g} to {values[-1]:.4g}")
        light, dark = (Picture(panel_svg(run.records, panel, dark=dark), SVG) for dark in (False, True))
        alt = f"Curve of {panel.title} by epoch: {', '.join(described)}"
        yield figure(light, dark=dark, caption=panel.title, alt=alt)


def results(run: RunMetrics) -> str:
    """The table of all figures of evaluations and losses."""
    rows = []
    for name in names_in(run.records):
        found = extremes(run.records, name)
        if found and found.best is not None:
            rows.append([name, f"{found.best:.5g}", str(found.best_epoch), f"{found.last:.5g}"])
    caption = "Best and last value of each figure, by its name in metrics.jsonl. Epochs count from 1."
    return table(["figure", "best", "epoch", "last"], rows, caption=caption, kind="number")


def predictions(folder: Path) -> Iterator[str]:
    for name, kind in PICTURES.items():
        if (folder / name).is_file():
            caption = "Validation images, what is true of them, and what the run predicts"
            yield scrolling(figure(Picture((folder / name).read_bytes(), kind), caption=caption, alt=caption), caption)


def settings(config: Mapping[str, Any]) -> Iterator[str]:
    """What differs from the defaults first, all in a fold."""
    if not config:
        return
    schema = schema_of(config)
    changed = [
        (name, str(value), str(schema[name].default), schema[name].about) if name in schema else (name, str(value))
        for name, value in config.items()
        if name not in schema or schema[name].default != value
    ]
    if changed:
        rows = [(*row, *[""] * (4 - len(row))) for row in changed]
        yield table(
            ["key", "value", "default", "meaning"], rows, caption="Settings that differ from the defaults", kind="key"
        )
    else:
        yield paragraph("All settings are the defaults.")
    everything = [(name, str(value)) for name, value in config.items()]
    yield folded(f"All {len(config)} settings", table(["key", "value"], everything, caption="All settings", kind="key"))


def surroundings(folder: Path) -> Iterator[str]:
    """Where the run took place last, and how often it was started."""
    starts = read_records(folder / "environment.jsonl")
    if not starts:
        return
    facts = {name: value for name, value in starts[-1].items() if name != "epoch" and value is not None}
    versions = facts.pop("packages", {})
    if isinstance(versions, dict):
        facts |= {name: version for name, version in versions.items() if version is not None}
    rows = [(name.replace("_", " "), str(value)) for name, value in facts.items()]
    yield table(["what", "where the run is"], rows, caption="Environment of the last start")
    if len(starts) > 1:
        rows = [(str(s.get("started")), f"from epoch {s['epoch'] + 1} on {s.get('host')}") for s in starts]
        yield folded(f"All {len(starts)} starts", table(["started (UTC)", "what"], rows, caption="Starts of the run"))


def warnings(folder: Path) -> Iterator[str]:
    """The last lines of the first process's log that warn or tell of errors."""
    path = folder / "log_rank0.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = [line for line in lines if " WARNING " in line[:40] or " ERROR " in line[:40]]
    if found:
        more = f"the last {MAX_WARNINGS} of {len(found)}" if len(found) > MAX_WARNINGS else str(len(found))
        yield paragraph(f"Lines of the log that warn or tell of errors: {more}.")
        yield preformatted("\n".join(found[-MAX_WARNINGS:]))


def report(folder: Path) -> str:
    """The page.

    Raises:
        OutputDirError: no run there.
        ValueError, OSError: a file of it that cannot be read.
    """
    run = read_run(folder)
    name = "/".join(folder.resolve().parts[-2:])
    return page(
        name,
        [
            overview(run, name),
            section("Curves", curves(curve_figures(run))),
            section("Results", results(run)),
            section("Predictions", *predictions(folder)),
            section("Settings", *settings(run.config)),
            section("Environment", *surroundings(folder)),
            section("Warnings", *warnings(folder)),
        ],
        generator=CREATOR,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, prog="python -m utils.report")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="by default RUN/report.html")
    parser.add_argument("--force", action="store_true", help="replace a file that another program made")
    words = parser.parse_args(argv)
    target = words.output or words.run / "report.html"
    with report_user_errors():
        text = report(words.run)
        check_replaceable(target, CREATOR, force=words.force)
        write_atomic(target, lambda path: path.write_text(text, encoding="utf-8"))
    print(f"report: {target} ({target.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

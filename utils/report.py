"""Report a run as one HTML file: python -m utils.report RUN [--output report.html]

RUN is the folder of a run, finished or not: <output>/<MODEL.NAME>/<tag>. The page is one file,
works offline, and holds results, curves, predictions, settings, environment and warnings.
"""

import base64
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from downstream.tasks import TASKS, task_with_keys
from utils.checkpoint.best_weights import describe_choice, is_ema_better
from utils.config.command_line import Parser, report_user_errors
from utils.logs.plots import Panel, panel_svg
from utils.logs.recorder import read_records
from utils.tools.run_history import METRIC_TITLES, RunMetrics, best_and_last, metric_names, read_run, select_panels
from utils.tools.user_files import check_output, user_file, write_result

CREATOR = "MLLA utils.report"
TEMPLATE = Path(__file__).parent / "tools" / "report.html"
PREDICTIONS = {"predictions.png": "image/png", "predictions.jpg": "image/jpeg"}
MAX_WARNINGS = 30


def data_uri(content: bytes, kind: str) -> str:
    """Return an image as a URI that a page can hold; `kind` is its media type, such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def summary(run: RunMetrics) -> str:
    """Return the line below the title: progress of the run and date of the report."""
    done, planned = run.records[-1]["epoch"] + 1, run.planned_epochs
    progress = f"epoch {done}" if planned is None else f"{done} of {planned} epochs"
    keys = {"model": run.metric, "EMA": f"ema_{run.metric}"}
    scores = {name: run.records[-1][key] for name, key in keys.items() if key in run.records[-1]}
    if len(scores) == 2:
        better = "EMA" if is_ema_better(scores) else "model"
        progress += f"; predictions by the {describe_choice(better, scores)}"
    return f"{progress}; report of {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"


def score_cards(run: RunMetrics) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, remark) of each best score."""
    for key in metric_names(run.records):
        kind = key.removeprefix("ema_")
        value = best_and_last(run.records, key)
        if kind in METRIC_TITLES and value and value.best is not None and not kind.endswith("loss"):
            label = f"EMA {kind}" if key.startswith("ema_") else kind
            yield f"best {label}", f"{value.best:.2f}", f"epoch {value.best_epoch}, last {value.last:.2f}"


def speed_cards(run: RunMetrics) -> Iterator[tuple[str, str, str]]:
    """Yield (name, value, remark) of speed, time and memory, as far as speed.jsonl has them."""
    rates = [record["images_per_second"] for record in run.records if "images_per_second" in record]
    if rates:
        rate = statistics.median(rates)
        yield "images/s", f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}", "in training, median over epochs"
    seconds = [sum(record.get(f"{part}_seconds", 0) for part in ("train", "eval")) for record in run.records]
    if all(seconds):
        waited = sum(record.get("data_wait_seconds", 0) for record in run.records) / sum(seconds)
        yield "time", duration(sum(seconds)), f"training and evaluation; {waited:.0%} of it spent waiting for data"
    memory = [record["memory_mib"] for record in run.records if "memory_mib" in record]
    if memory:
        yield "memory", f"{max(memory) / 1024:.2f} GiB", "peak on the first process"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def curves(run: RunMetrics) -> Iterator[dict[str, str]]:
    """Yield each plot: title, alternative text, and images for light and dark pages. The loss has all its terms."""
    names = metric_names(run.records)
    terms = {name: name[6:] for name in names if name.startswith("train_") and not name.endswith("_seconds")}
    for panel in select_panels(names):
        if "train_loss" in panel.curves and len(terms) > 1:
            panel = Panel(panel.title, terms | {"train_loss": "all terms"})
        described = []
        for name, label in panel.curves.items():
            values = [record[name] for record in run.records if name in record]
            described.append(f"{label} from {values[0]:.4g} to {values[-1]:.4g}")
        yield {
            "title": panel.title,
            "alt": f"Curve of {panel.title} by epoch: {', '.join(described)}",
            "light": data_uri(panel_svg(run.records, panel, dark=False), "image/svg+xml"),
            "dark": data_uri(panel_svg(run.records, panel, dark=True), "image/svg+xml"),
        }


def results(run: RunMetrics) -> Iterator[tuple[str, str, int | None, str]]:
    """Yield name, best value, its epoch, and last value of each score and loss."""
    for name in metric_names(run.records):
        value = best_and_last(run.records, name)
        if value and value.best is not None:
            yield name, f"{value.best:.5g}", value.best_epoch, f"{value.last:.5g}"


def changed_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield key, value, default and meaning of settings that differ from the defaults, and of unknown keys."""
    schema = TASKS[task_with_keys(config)].schema
    for name, value in config.items():
        if name not in schema:
            yield name, value, "", ""
        elif schema[name].default != value:
            yield name, value, schema[name].default, schema[name].help


def environment(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return machine, command and versions of a start, by name."""
    metadata = {name: value for name, value in start.items() if name != "epoch" and value is not None}
    versions = metadata.pop("packages", {})
    if isinstance(versions, dict):
        metadata |= {name: version for name, version in versions.items() if version is not None}
    return {name.replace("_", " "): value for name, value in metadata.items()}


def warnings(folder: Path) -> list[str]:
    """Return the warnings and errors in the log of the first process."""
    path = folder / "log_rank0.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [line for line in lines if " WARNING " in line[:40] or " ERROR " in line[:40]]


def report(folder: Path) -> str:
    """Return the page.

    Raises:
        RunFolderError: the folder holds no run.
        UserFileError: a file in it cannot be read.
    """
    run = read_run(folder)
    with user_file(folder, "read"):
        starts = read_records(folder / "environment.jsonl")
        log_warnings = warnings(folder)
        images = {path: kind for name, kind in PREDICTIONS.items() if (path := folder / name).is_file()}
        predictions = [data_uri(path.read_bytes(), kind) for path, kind in images.items()]
    templates = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True, keep_trailing_newline=True
    )
    return templates.get_template(TEMPLATE.name).render(
        name="/".join(folder.resolve().parts[-2:]),
        generator=CREATOR,
        summary=summary(run),
        cards=[*score_cards(run), *speed_cards(run)],
        curves=curves(run),
        results=results(run),
        predictions=predictions,
        settings=run.config,
        changed=[*changed_settings(run.config)],
        environment=environment(starts[-1]) if starts else {},
        starts=[(start.get("started"), f"from epoch {start['epoch'] + 1} on {start.get('host')}") for start in starts],
        warnings=log_warnings,
        shown_warnings=MAX_WARNINGS,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="by default RUN/report.html")
    parser.add_argument("--force", action="store_true", help="replace a file that another program made")
    args = parser.parse_args(argv)
    target = args.output or args.run / "report.html"
    with report_user_errors():
        text = report(args.run)
        check_output(target, force=args.force, creator=CREATOR)
        write_result(target, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))
    print(f"report: {target} ({target.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

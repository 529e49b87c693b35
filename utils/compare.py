"""Compare runs: python -m utils.compare RUN RUN ... [--keys acc1 lr] [--output comparison.png]

RUN is the folder of a run, finished or not: <output>/<MODEL.NAME>/<tag>. Plots the curves of all runs in one figure,
and prints their metrics and the settings in which they differ, as Markdown tables.
"""

import argparse
import difflib
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.config.command_line import Parser, report_user_errors
from utils.logs.plots import comparison_plot
from utils.tools.run_history import (
    RunFolderError,
    RunMetrics,
    best_and_last,
    differing_settings,
    is_loss,
    metric_names,
    read_run,
    select_panels,
)
from utils.tools.user_files import check_output, write_result

CREATOR = "MLLA utils.compare"
LOCATION_KEYS = ("BASE", "OUTPUT", "TAG", "LOCAL_RANK")  # where a run is, not what it does
MAX_VALUE_LENGTH = 40  # characters of a setting in the table


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the folders apart.

    Raises:
        RunFolderError: a folder is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    if twice := [folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]:
        raise RunFolderError(f"{twice[0]}: is named twice")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def check_keys(keys: Sequence[str], names: Sequence[str]) -> None:
    """Raise RunFolderError for a key that no run has."""
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the runs have {', '.join(names)}"
            raise RunFolderError(f"--keys {key}: no run has this metric; {hint}")


def metrics_table(
    runs: dict[str, RunMetrics], keys: Sequence[str], *, with_best: Callable[[str], bool]
) -> list[list[str]]:
    """Return one row per run: epochs, best value and epoch of metrics `with_best`, last values, median speed."""
    columns: dict[str, list[str]] = {"run": list(runs), "epochs": [epochs_of(run) for run in runs.values()]}
    for key in keys:
        values = [best_and_last(run.records, key) for run in runs.values()]
        if key == "images_per_second":
            rates = [[r[key] for r in run.records if key in r] for run in runs.values()]
            columns["images/s, median"] = [f"{statistics.median(rate):.4g}" if rate else "" for rate in rates]
            continue
        if with_best(key) and any(value and value.best is not None for value in values):
            columns[f"{key}, best (epoch)"] = [
                f"{value.best:.5g} ({value.best_epoch})" if value and value.best is not None else "" for value in values
            ]
        columns[f"{key}, last"] = [f"{value.last:.5g}" if value else "" for value in values]
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def epochs_of(run: RunMetrics) -> str:
    done, planned = run.records[-1]["epoch"] + 1, run.planned_epochs
    return str(done) if planned in (None, done) else f"{done} of {planned}"


def settings_table(runs: dict[str, RunMetrics]) -> list[list[str]]:
    """Return one row per key in which the configurations differ."""
    rows = [["key", *runs]]
    for name, values in differing_settings([run.config for run in runs.values()]):
        if name not in LOCATION_KEYS:
            rows.append([name, *map(shortened, values)])
    return rows


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 3]}..."


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format a table, its first row the heading, with aligned columns."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (n + 2) for n in widths) + "|", *lines[1:]])


def compare(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        RunFolderError: a folder without a run, or a metric that no run has.
        UserFileError: --output would replace a file of another program, or cannot be written.
    """
    check_output(args.output, suffixes=(".png", ".svg", ".pdf"), force=args.force, creator=CREATOR)
    runs = dict(zip(short_names(args.runs), map(read_run, args.runs), strict=True))
    names = metric_names([record for run in runs.values() for record in run.records])
    check_keys(args.keys, names)
    panels = select_panels(names, args.keys)
    if not panels:
        raise RunFolderError(f"nothing to plot among {', '.join(names)}; choose with --keys")
    records = {name: run.records for name, run in runs.items()}
    plot = comparison_plot(records, panels, args.output.suffix[1:], creator=CREATOR)
    write_result(args.output, lambda path: path.write_bytes(plot))
    in_table = [key for panel in panels for key in panel.curves if args.keys or key not in ("lr", "grad_norm")]
    print(markdown(metrics_table(runs, in_table, with_best=lambda key: bool(args.keys) or not is_loss(key))))
    if len(runs) > 1:
        settings = settings_table(runs)
        print("\n" + (markdown(settings) if len(settings) > 1 else "no setting differs"))
    if without_config := [name for name, run in runs.items() if not run.config]:
        print(f"\nno config.yaml, so settings are unknown: {', '.join(without_config)}")
    print(f"\ncurves: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--keys", nargs="+", default=[], metavar="NAME", help="metrics, by their names in the files")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), metavar="FILE", help=".png, .svg, .pdf")
    parser.add_argument("--force", action="store_true", help="replace a file that another program made")
    with report_user_errors():
        compare(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())

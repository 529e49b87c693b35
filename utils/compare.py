"""Compare runs: python -m utils.compare RUN RUN ... [--keys acc1 lr] [--output comparison.png]

RUN is the folder of a run, finished or not: <output>/<MODEL.NAME>/<tag>. Draws their curves in one picture, and prints
their figures and the settings in which they differ, as Markdown tables.
"""

import argparse
import difflib
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.config.command_line import Parser, report_user_errors
from utils.logs.atomic_write import check_replaceable, write_atomic
from utils.logs.plots import comparison_picture
from utils.tools.run_history import (
    OutputDirError,
    RunMetrics,
    differing_settings,
    extremes,
    is_loss,
    names_in,
    panels_of,
    read_run,
)

CREATOR = "MLLA utils.compare"
PLACE = ("BASE", "OUTPUT", "TAG", "LOCAL_RANK")  # where a run is, not what it does
MAX_VALUE = 40  # characters of a setting in the table


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart.

    Raises:
        OutputDirError: one is there twice.
    """
    paths = [folder.resolve() for folder in folders]
    if twice := [folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]:
        raise OutputDirError(f"{twice[0]}: is named twice")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def check_keys(keys: Sequence[str], names: Sequence[str]) -> None:
    """Raise OutputDirError at a key that no run has."""
    for key in keys:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise OutputDirError(f"--keys {key}: no run has such a figure; {hint}")


def figures_table(
    runs: dict[str, RunMetrics], keys: Sequence[str], *, with_best: Callable[[str], bool]
) -> list[list[str]]:
    """A line a run: epochs, each figure's best value with its epoch where that is asked for, its last, median speed."""
    columns: dict[str, list[str]] = {"run": list(runs), "epochs": [epochs_of(run) for run in runs.values()]}
    for key in keys:
        found = [extremes(run.records, key) for run in runs.values()]
        if key == "images_per_second":
            rates = [[r[key] for r in run.records if key in r] for run in runs.values()]
            columns["images/s, median"] = [f"{statistics.median(rate):.4g}" if rate else "" for rate in rates]
            continue
        if with_best(key) and any(item and item.best is not None for item in found):
            columns[f"{key}, best (epoch)"] = [
                f"{item.best:.5g} ({item.best_epoch})" if item and item.best is not None else "" for item in found
            ]
        columns[f"{key}, last"] = [f"{item.last:.5g}" if item else "" for item in found]
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def epochs_of(run: RunMetrics) -> str:
    done, planned = run.records[-1]["epoch"] + 1, run.planned_epochs
    return str(done) if planned in (None, done) else f"{done} of {planned}"


def settings_table(runs: dict[str, RunMetrics]) -> list[list[str]]:
    """A line a key that the configurations differ in."""
    rows = [["key", *runs]]
    for name, values in differing_settings([run.config for run in runs.values()]):
        if name not in PLACE:
            rows.append([name, *map(shortened, values)])
    return rows


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table with a heading, in columns as wide as they need to be."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (n + 2) for n in widths) + "|", *lines[1:]])


def compare(words: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        OutputDirError: a folder that holds no run, or a figure that none has.
        FileExistsError: the picture would replace a file that is not such a picture.
    """
    if words.output.suffix not in (".png", ".svg", ".pdf"):
        raise OutputDirError(f"{words.output}: its name must end in .png, .svg or .pdf")
    check_replaceable(words.output, CREATOR, force=words.force)
    runs = dict(zip(names_of(words.runs), map(read_run, words.runs), strict=True))
    names = names_in([record for run in runs.values() for record in run.records])
    check_keys(words.keys, names)
    panels = panels_of(names, words.keys)
    if not panels:
        raise OutputDirError(f"nothing to draw among {', '.join(names)}; choose with --keys")
    pictured = {name: run.records for name, run in runs.items()}
    picture = comparison_picture(pictured, panels, words.output.suffix[1:], creator=CREATOR)
    write_atomic(words.output, lambda path: path.write_bytes(picture))
    in_table = [key for panel in panels for key in panel.curves if words.keys or key not in ("lr", "grad_norm")]
    print(markdown(figures_table(runs, in_table, with_best=lambda key: bool(words.keys) or not is_loss(key))))
    if len(runs) > 1:
        settings = settings_table(runs)
        print("\n" + (markdown(settings) if len(settings) > 1 else "no setting differs"))
    if bare := [name for name, run in runs.items() if not run.config]:
        print(f"\nwithout settings, as there is no config.yaml: {', '.join(bare)}")
    print(f"\ncurves: {words.output}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, prog="python -m utils.compare")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--keys", nargs="+", default=[], metavar="NAME", help="figures, by their names in the files")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), metavar="FILE", help=".png, .svg, .pdf")
    parser.add_argument("--force", action="store_true", help="replace a file that another program made")
    with report_user_errors():
        compare(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())

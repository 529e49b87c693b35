"""Train every row of the paper's tables 1 and 2 at small scale, with several seeds, and compare with the paper.

python -m models.ablation_study                          twelve rows, three seeds, cfgs/ablation/digits.yaml
python -m models.ablation_study --epochs 100 --amp       longer, for example on a GPU
python -m models.ablation_study --minutes 5              start no run after five minutes; the same command resumes
python -m models.ablation_study --scale cfgs/ablation/fashion_mnist.yaml --seeds 0 1 2 3 4 --jobs 8 --amp

Each run is a process of main.py. Finished runs are recorded in <output>/results.jsonl and skipped; others resume.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from config import load_config
from models.ablation_statistics import differences, rank_correlation
from models.build import build_model
from models.unified.paper_rows import ABLATIONS, Ablation
from utils.benchmark.measure import measure_in_turns
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError, file_errors
from utils.tools import study
from utils.tools.paper_plots import plot_ablation
from utils.tools.study import ROOT, Job, run_jobs
from utils.training.build import build_precision

# The block of MLLA in the baseline's pyramid, which the paper does not report.
MLLA_BLOCK = Ablation("mlla_like", "MLLA's block", 0, nan, nan, 0, nan)


class RunResult(NamedTuple):
    """A finished run: acc1 is the last epoch's validation accuracy in percent."""

    row: str
    seed: int
    epochs: int
    scale: str
    acc1: float
    seconds: float
    amp: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with report_user_errors(), file_errors(UserError, args.output, "written", "choose another --output"):
        rows = select_rows(args.rows)
        (args.output / "cfgs").mkdir(parents=True, exist_ok=True)
        configs = {row.name: row_config(args, row) for row in rows}
        missing = train_missing(args, rows)
    results = read_results(args)
    if missing:
        print(f"{len(results)} runs finished, {missing} left; run the same command again to resume")
        return 3
    speeds = measure_rows(configs)
    text = results_table(rows, results, speeds, configs[rows[0].name])
    (args.output / "results.md").write_text(text)
    (args.output / "speeds.json").write_text(json.dumps(speeds, indent=1))
    plot_ablation(
        [row.label for row in rows],
        paper=[row.top1 for row in rows],
        scores=[[run.acc1 for run in results if run.row == row.name] for row in rows],
        title=f"{args.scale.stem}, {num_epochs(args)} epochs",
        picture=args.output / "results.png",
    )
    print(text)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    study.add_arguments(parser, "output/ablation", num_seeds=3)
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[row.name for row in ABLATIONS],
        help="names of rows, by default the paper's; also mlla_like",
    )
    parser.add_argument(
        "--scale",
        type=Path,
        default=ROOT / "cfgs/ablation/digits.yaml",
        help="YAML file of sizes, data and schedule",
    )
    parser.add_argument("--epochs", type=at_least(1), help="override TRAIN.EPOCHS")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1),
        help="concurrent runs, which GPUs take in turns",
    )
    return parser.parse_args(argv)


def select_rows(names: Sequence[str]) -> list[Ablation]:
    """Return the rows of these names.

    Raises:
        UserError: unknown name.
    """
    known = {row.name: row for row in (*ABLATIONS, MLLA_BLOCK)}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--rows {' '.join(unknown)}: must be among {', '.join(known)}")
    return [known[name] for name in names]


def row_config(args: argparse.Namespace, row: Ablation) -> CfgNode:
    """Write the configuration of a row at this scale to <output>/cfgs/<row>.yaml, and load it."""
    path = args.output / "cfgs" / f"{row.name}.yaml"
    bases = [str(ROOT / "cfgs/ablation" / f"{row.name}.yaml"), str(args.scale.resolve())]
    path.write_text(f"BASE: {json.dumps(bases)}\nMODEL:\n  NAME: {row.model}\n")
    return load_config(path, ["AMP", str(args.amp)])


def num_epochs(args: argparse.Namespace) -> int:
    return args.epochs or load_config(args.scale).TRAIN.EPOCHS


def train_missing(args: argparse.Namespace, rows: Sequence[Ablation]) -> int:
    """Train the runs that have no result, --jobs at a time, until --minutes; return how many are still missing.

    Raises:
        UserError: main.py failed; the message names its console log.
    """
    done = {(run.row, run.seed) for run in read_results(args)}
    todo = {
        f"{row.name}, seed {seed}": (row, seed) for seed in args.seeds for row in rows if (row.name, seed) not in done
    }

    def read_result(job: Job, seconds: float) -> dict[str, Any] | None:
        row, seed = todo[job.name]
        last = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[-1])
        if last["epoch"] + 1 < num_epochs(args):  # stopped by a signal, after it saved a checkpoint
            return None
        return RunResult(row.name, seed, num_epochs(args), args.scale.stem, last["acc1"], seconds, args.amp)._asdict()

    return run_jobs(
        [make_job(args, row, seed, name) for name, (row, seed) in todo.items()],
        read_result,
        lambda run: f"{run['row']}, seed {run['seed']}: {run['acc1']:.2f}% in {run['seconds']:.0f} s",
        results=args.output / "results.jsonl",
        num_parallel=args.jobs,
        minutes=args.minutes,
        OMP_NUM_THREADS="1",
    )


def make_job(args: argparse.Namespace, row: Ablation, seed: int, name: str) -> Job:
    epochs = num_epochs(args)
    tag = f"seed{seed}_epochs{epochs}{'_amp' if args.amp else ''}"
    command = ["--cfg", str(args.output.resolve() / "cfgs" / f"{row.name}.yaml")]
    command += ["--output", str((args.output / "runs").resolve()), "--tag", tag, *(["--amp"] if args.amp else [])]
    command += ["--opts", "SEED", str(seed), "TRAIN.EPOCHS", str(epochs)]
    return Job(name, command, args.output / "runs" / row.model / tag)


def read_results(args: argparse.Namespace) -> list[RunResult]:
    """Return the results for this scale, number of epochs, precision, rows and seeds.

    Raises:
        UserError: a line of results.jsonl is no result.
    """
    budget = num_epochs(args), args.scale.stem, args.amp
    return [
        run
        for run in study.read_results(args.output / "results.jsonl", RunResult)
        if (run.epochs, run.scale, run.amp) == budget and run.row in args.rows and run.seed in args.seeds
    ]


def measure_rows(configs: dict[str, CfgNode]) -> dict[str, float]:
    """Measure inference on this machine: images per second by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = next(iter(configs.values()))
    return measure_in_turns(
        {name: build_model(row) for name, row in configs.items()},
        device=device,
        precision=build_precision(config, device),
        batch_size=config.DATA.BATCH_SIZE,
        image_size=config.DATA.IMG_SIZE,
    )


def results_table(
    rows: Sequence[Ablation], results: Sequence[RunResult], speeds: dict[str, float], config: CfgNode
) -> str:
    """Return a Markdown table of accuracy (mean and standard deviation over seeds) and speed, beside the paper's."""
    seeds = len({run.seed for run in results})
    size, batch = config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE
    lines = [
        f"| row | paper, top-1 | here, {seeds} seeds | paper, img/s | here, img/s, {size}x{size}, batch {batch} |",
        "|---|---|---|---|---|",
    ]
    first = rows[0]
    by_row = {row.name: [run.acc1 for run in results if run.row == row.name] for row in rows}
    for row in rows:
        scores = by_row[row.name]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        is_published = not isnan(row.top1)
        paper_speed = f"{row.images_per_second} ({row.images_per_second / first.images_per_second:.2f})"
        speed = f"{speeds[row.name]:.0f} ({speeds[row.name] / speeds[first.name]:.2f})"
        paper = (row.top1, paper_speed) if is_published else ("", "")
        lines.append(f"| {row.label} | {paper[0]} | {statistics.mean(scores):.2f}{spread} | {paper[1]} | {speed} |")
    return "\n".join(lines) + "\n" + statistics_text(rows, by_row)


def statistics_text(rows: Sequence[Ablation], scores: dict[str, list[float]]) -> str:
    """Return a table of differences from the first row, and the rank correlation with the paper; "" for one seed."""
    if min(map(len, scores.values())) < 2:
        return ""
    lines = [
        f"\n| row | paper, difference from {rows[0].label} | here (95% interval) | p |",
        "|---|---|---|---|",
    ]
    found = differences(scores)
    for row in rows[1:]:
        paper = "" if isnan(row.top1) else f"{row.top1 - rows[0].top1:+.1f}"
        lines.append(f"| {' | '.join([row.label, paper, *found[row.name].cells()])} |")
    lines.append("\np: Welch's t-test, corrected for the number of rows by Holm's method.")
    published = [row for row in rows if not isnan(row.top1)]
    if len(published) > 2:
        rank = rank_correlation([row.top1 for row in published], [scores[row.name] for row in published])
        lines.append(
            f"Spearman's rank correlation with the paper's top-1: {rank.value:.2f}, "
            f"95% interval over seeds {rank.low:.2f} to {rank.high:.2f}."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

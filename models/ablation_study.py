"""Train every row of the paper's tables 1 and 2 at small scale, with several seeds, and set them beside the paper's.

python -m models.ablation_study                          twelve rows, three seeds, cfgs/ablation/digits.yaml
python -m models.ablation_study --epochs 100 --amp       longer, on a GPU say
python -m models.ablation_study --minutes 5              start no run after five minutes; the same command goes on

Each run is one of main.py. Finished ones are noted in <output>/results.jsonl and not repeated; a broken one resumes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from config import load_config
from models.build import build_model
from models.unified.paper_rows import ABLATIONS, Ablation
from utils.benchmark.measure import measure_in_turns
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.tools.paper_plots import plot_ablation
from utils.training.build import build_precision

ROOT = Path(__file__).parent.parent


class Trained(NamedTuple):
    """A finished run: accuracy of the last epoch on the validation images, per cent."""

    row: str
    seed: int
    epochs: int
    scale: str
    acc1: float
    seconds: float
    amp: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with report_user_errors():
        rows = chosen_rows(options.rows)
        options.output.mkdir(parents=True, exist_ok=True)
        configs = {row.name: row_config(options, row) for row in rows}
        missing = train_missing(options, rows)
    results = read_results(options)
    if missing:
        print(f"{len(results)} runs are done, {missing} are left; the same command goes on")
        return 3
    speeds = measure_rows(configs)
    text = results_table(rows, results, speeds, configs[rows[0].name])
    (options.output / "results.md").write_text(text)
    (options.output / "speeds.json").write_text(json.dumps(speeds, indent=1))
    plot_ablation(
        [row.label for row in rows],
        paper=[row.top1 for row in rows],
        scores=[[run.acc1 for run in results if run.row == row.name] for row in rows],
        title=f"{options.scale.stem}, {epochs_of(options)} epochs",
        picture=options.output / "results.png",
    )
    print(text)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/ablation"), help="folder of runs and results")
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ABLATIONS], help="all of them by default")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--scale", type=Path, default=ROOT / "cfgs/ablation/digits.yaml", help="sizes, data and schedule"
    )
    parser.add_argument("--epochs", type=at_least(1), help="instead of the scale's")
    parser.add_argument("--amp", action="store_true", help="16-bit autocast")
    parser.add_argument(
        "--jobs", type=at_least(1), default=1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further run after this time")
    return parser.parse_args(argv)


def chosen_rows(names: Sequence[str]) -> list[Ablation]:
    known = {row.name: row for row in ABLATIONS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--rows {' '.join(unknown)}: known are {', '.join(known)}")
    return [known[name] for name in names]


def row_config(options: argparse.Namespace, row: Ablation) -> CfgNode:
    """The row's switches at the scale's sizes, written to <output>/cfgs/<row>.yaml for main.py to take."""
    path = options.output / "cfgs" / f"{row.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    bases = [str(ROOT / "cfgs/ablation" / f"{row.name}.yaml"), str(options.scale.resolve())]
    path.write_text(f"BASE: {json.dumps(bases)}\nMODEL:\n  NAME: {row.model}\n")
    return load_config(path, ["AMP", str(options.amp)])


def epochs_of(options: argparse.Namespace) -> int:
    return options.epochs or load_config(options.scale).TRAIN.EPOCHS


def train_missing(options: argparse.Namespace, rows: Sequence[Ablation]) -> int:
    """Train what has no result, a few runs at a time, until the time is up; gives how many are still missing."""
    done = {(run.row, run.seed) for run in read_results(options)}
    todo = [(row, seed) for seed in options.seeds for row in rows if (row.name, seed) not in done]
    deadline = time.monotonic() + 60 * options.minutes
    finished = 0
    with ThreadPoolExecutor(max_workers=options.jobs) as pool:
        futures: list[Future[Trained | None]] = [
            pool.submit(train, options, row, seed, deadline=deadline) for row, seed in todo
        ]
        try:
            for future in as_completed(futures):
                if (run := future.result()) is not None:
                    finished += 1
                    with (options.output / "results.jsonl").open("a") as file:
                        file.write(json.dumps(run._asdict()) + "\n")
                    print(f"{run.row}, seed {run.seed}: {run.acc1:.2f}% in {run.seconds:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(todo) - finished


def train(options: argparse.Namespace, row: Ablation, seed: int, *, deadline: float) -> Trained | None:
    """One run of main.py; None where the time was up before it started, or main.py was stopped.

    Raises:
        ValueError: main.py failed; says where its messages are.
    """
    start, epochs = time.monotonic(), epochs_of(options)
    if start > deadline:
        return None
    tag = f"seed{seed}_epochs{epochs}{'_amp' if options.amp else ''}"
    folder = options.output / "runs" / row.model / tag
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "main.py", "--cfg", options.output.resolve() / "cfgs" / f"{row.name}.yaml"]
    command += ["--output", (options.output / "runs").resolve(), "--tag", tag, *(["--amp"] if options.amp else [])]
    command += ["--opts", "SEED", str(seed), "TRAIN.EPOCHS", str(epochs)]
    with (folder / "console.txt").open("a") as console:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        code = subprocess.call(list(map(str, command)), cwd=ROOT, env=environment, stdout=console, stderr=console)
    if code:
        raise ValueError(f"{row.name}, seed {seed}: main.py ended with code {code}; see {folder / 'console.txt'}")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    if last["epoch"] + 1 < epochs:  # it was told to stop, and saved what it had
        return None
    return Trained(row.name, seed, epochs, options.scale.stem, last["acc1"], time.monotonic() - start, options.amp)


def read_results(options: argparse.Namespace) -> list[Trained]:
    """What results.jsonl holds of this scale, epochs and precision, and of the rows and seeds that were asked for."""
    path = options.output / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    runs = [Trained(**json.loads(line)) for line in lines]
    wanted = epochs_of(options), options.scale.stem, options.amp
    return [
        run
        for run in runs
        if (run.epochs, run.scale, run.amp) == wanted and run.row in options.rows and run.seed in options.seeds
    ]


def measure_rows(configs: dict[str, CfgNode]) -> dict[str, float]:
    """Images per second of inference by row, at the scale's size, on this machine."""
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
    rows: Sequence[Ablation], results: Sequence[Trained], speeds: dict[str, float], config: CfgNode
) -> str:
    """Accuracy, mean and standard deviation over the seeds, and speed relative to the first row, beside the paper's."""
    seeds = len({run.seed for run in results})
    size, batch = config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE
    lines = [
        f"| row | paper, top-1 | here, {seeds} seeds | paper, img/s | here, img/s, {size}x{size}, batch {batch} |",
        "|---|---|---|---|---|",
    ]
    first = rows[0]
    for row in rows:
        scores = [run.acc1 for run in results if run.row == row.name]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        paper_speed = f"{row.images_per_second} ({row.images_per_second / first.images_per_second:.2f})"
        speed = f"{speeds[row.name]:.0f} ({speeds[row.name] / speeds[first.name]:.2f})"
        lines.append(f"| {row.label} | {row.top1} | {statistics.mean(scores):.2f}{spread} | {paper_speed} | {speed} |")
    return "\n".join(lines) + "\n" + "".join(rank_agreement(rows, results))


def rank_agreement(rows: Sequence[Ablation], results: Sequence[Trained]) -> Iterator[str]:
    """Spearman's rank correlation between the paper's accuracies and these, of three rows or more."""
    from scipy.stats import spearmanr

    if len(rows) > 2:
        means = [statistics.mean(run.acc1 for run in results if run.row == row.name) for row in rows]
        found: Any = spearmanr([row.top1 for row in rows], means)
        yield f"\nSpearman's rank correlation with the paper's top-1: {found.statistic:.2f} (p = {found.pvalue:.2f}).\n"


if __name__ == "__main__":
    sys.exit(main())

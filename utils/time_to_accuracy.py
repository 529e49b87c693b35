"""Measure the time to an accuracy: python -m utils.time_to_accuracy --cfg cfgs/fashion_mnist.yaml --target 95 --amp

Each seed is a whole run of main.py in a process of its own, and the time counts from that process's start. It ends with
the evaluation in which the model or its EMA first reaches the target. Runs are recorded in <output>/results.jsonl, and
later calls, also with another target, do not repeat them; a run that was interrupted starts anew.
"""

import argparse
import hashlib
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from config import load_config
from utils.config.command_line import Parser, report_user_errors
from utils.config.errors import UserError, file_errors
from utils.logs.environment import device_name
from utils.logs.recorder import read_records
from utils.tools.study import Job, add_arguments, read_results, run_jobs

SECONDS = ("process_seconds", "train_seconds", "eval_seconds")


class TimedRun(NamedTuple):
    """A finished run; the lists have a value per epoch: accuracy in percent of the better of model and EMA, seconds.

    `process_seconds` are those from the start of the process to the end of the epoch's evaluation.
    """

    cfg: str
    settings: str
    seed: int
    device: str
    accuracy: list[float]
    process_seconds: list[float]
    train_seconds: list[float]
    eval_seconds: list[float]


class Reached(NamedTuple):
    """Seconds from the start of a process until a target was reached, and what they were spent on.

    `compilation` is what the first epoch takes beyond the median of the later ones: compiling, capturing graphs, and
    the start of the processes that load data. `other` is saving and drawing.
    """

    total: float
    startup: float
    compilation: float
    training: float
    evaluation: float
    other: float


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with report_user_errors(), file_errors(UserError, args.output, "written", "choose another --output"):
        config = load_config(args.cfg, args.opts, {"AMP": True} if args.amp else {})
        settings = digest(config)
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / "results.jsonl"
        known = {run.seed for run in own_runs(path, settings, args.seeds)}
        jobs = {seed: make_job(args, config, settings, seed) for seed in args.seeds if seed not in known}
        seeds = {job.name: seed for seed, job in jobs.items()}
        num_epochs = config.TRAIN.EPOCHS + config.TRAIN.COOLDOWN_EPOCHS
        identity = {"cfg": args.cfg, "settings": settings, "device": device()}
        left = run_jobs(
            list(jobs.values()),
            lambda job, _: read_run(job.folder, num_epochs, {**identity, "seed": seeds[job.name]}),
            lambda run: (
                f"seed {run['seed']}: best {max(run['accuracy']):.2f}%, {run['process_seconds'][-1]:.0f} s in all"
            ),
            results=path,
            num_parallel=1,
            minutes=args.minutes,
        )
        runs = own_runs(path, settings, args.seeds)
    if runs:
        print(report(runs, args.target))
    if left:
        print(f"{len(runs)} runs finished, {left} left; run the same command again for them")
        return 3
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("--target", type=float, required=True, help="top-1 accuracy in percent")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="settings over the file's"
    )
    add_arguments(parser, "output/time_to_accuracy")
    return parser.parse_args(argv)


def digest(config: CfgNode) -> str:
    """Return a short hash of all settings of a run."""
    return hashlib.sha256(config.dump().encode()).hexdigest()[:10]


def device() -> str:
    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def own_runs(path: Path, settings: str, seeds: Sequence[int]) -> list[TimedRun]:
    """Return the recorded runs with these settings and seeds on this kind of device."""
    runs = read_results(path, TimedRun)
    return [run for run in runs if (run.settings, run.device) == (settings, device()) and run.seed in seeds]


def make_job(args: argparse.Namespace, config: CfgNode, settings: str, seed: int) -> Job:
    output, tag = (args.output / "runs").resolve(), f"{settings}_seed{seed}"
    command = ["--cfg", str(Path(args.cfg).resolve()), "--output", str(output), "--tag", tag]
    command += ["--amp"] if args.amp else []
    command += ["--opts", *args.opts, "SEED", str(seed), "TRAIN.AUTO_RESUME", "False"]
    return Job(f"seed {seed}", command, output / config.MODEL.NAME / tag)


def read_run(folder: Path, num_epochs: int, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a run, or None if it was stopped before its last epoch."""
    metrics, speeds = (read_records(folder / name) for name in ("metrics.jsonl", "speed.jsonl"))
    if len(metrics) < num_epochs:
        return None
    accuracy = [max(record["acc1"], record.get("ema_acc1", 0.0)) for record in metrics]
    recent = speeds[-len(metrics) :]  # an interrupted run's come first
    return {**identity, "accuracy": accuracy, **{name: [record[name] for record in recent] for name in SECONDS}}


def reach(run: TimedRun, target: float) -> Reached | None:
    """Return the seconds until a run reached the target, or None if it did not."""
    epoch = next((i for i, accuracy in enumerate(run.accuracy) if accuracy >= target), None)
    if epoch is None:
        return None
    total = run.process_seconds[epoch]
    startup = run.process_seconds[0] - run.train_seconds[0] - run.eval_seconds[0]
    later = [statistics.median(times[1:] or times) for times in (run.train_seconds, run.eval_seconds)]
    first = max(0.0, run.train_seconds[0] - later[0]), max(0.0, run.eval_seconds[0] - later[1])
    training = sum(run.train_seconds[: epoch + 1]) - first[0]
    evaluation = sum(run.eval_seconds[: epoch + 1]) - first[1]
    other = total - startup - sum(first) - training - evaluation
    return Reached(total, startup, sum(first), training, evaluation, other)


def report(runs: Sequence[TimedRun], target: float) -> str:
    """Return a Markdown table: seconds to the target by seed, and medians; a run that misses it counts as endless."""
    names = [name.replace("startup", "start-up") for name in Reached._fields]
    lines = [f"| seed | {' | '.join(names)} | best, % |", "|---" * (len(names) + 2) + "|"]
    reached = [reach(run, target) for run in runs]
    for run, times in zip(runs, reached, strict=True):
        texts = [f"{seconds:.1f}" for seconds in times] if times else ["not reached", *[""] * (len(names) - 1)]
        lines.append(f"| {run.seed} | {' | '.join(texts)} | {max(run.accuracy):.2f} |")
    columns = zip(*(times or [math.inf] * len(names) for times in reached), strict=True)
    medians = [statistics.median(column) for column in columns]
    lines.append(
        f"| median | {' | '.join('not reached' if math.isinf(seconds) else f'{seconds:.1f}' for seconds in medians)} | "
        f"{statistics.median(max(run.accuracy) for run in runs):.2f} |"
    )
    count = sum(times is not None for times in reached)
    return f"Seconds to {target:g}% top-1 on {runs[0].device}; {count} of {len(runs)} runs reached it\n\n" + "\n".join(
        lines
    )


if __name__ == "__main__":
    sys.exit(main())

"""Train MLLA, ConvNeXt, Swin and ResNet of equal size with and without MESA: the paper's table 7 in small.

python -m models.mesa_study --amp --jobs 8       the same steps for all, five seeds each, cfgs/mesa/*.yaml
python -m models.mesa_study --amp --jobs 8 --equal-time
                                                 the same time for all: epochs by the speed of the runs of equal steps
python -m models.mesa_study --minutes 25         start no run after 25 minutes; the same command resumes

Each run is a process of main.py. Finished runs are recorded in <output>/results.jsonl and skipped; others resume.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config import load_config
from models.ablation_statistics import differences, holm
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError, file_errors
from utils.logs.recorder import read_records
from utils.tools import study
from utils.tools.paper_plots import plot_pairs
from utils.tools.study import ROOT, Job, run_jobs

LABELS = {"mlla": "MLLA", "convnext": "ConvNeXt", "swin": "Swin", "resnet": "ResNet"}
MESA = {False: 0.0, True: 1.0}  # loss weights


class MesaRun(NamedTuple):
    """A finished run: accuracies of model and EMA after the last epoch in percent, seconds of training per epoch."""

    model: str
    mesa: bool
    seed: int
    budget: str
    epochs: int
    amp: bool
    acc1: float
    ema_acc1: float
    epoch_seconds: float

    @property
    def accuracy(self) -> float:
        """Accuracy of the better weights."""
        return max(self.acc1, self.ema_acc1)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with report_user_errors(), file_errors(UserError, args.output, "written", "choose another --output"):
        args.output.mkdir(parents=True, exist_ok=True)
        steps = runs_of(args, "equal steps")
        left = train_missing(args, epochs_by_group(args, steps))
        budget = "equal time" if args.equal_time else "equal steps"
        runs = runs_of(args, budget)
        if left:
            print(f"{len(runs)} runs finished, {left} left; run the same command again to resume")
            return 3
        text, name = results_table(args.models, runs), budget.replace(" ", "_")
        (args.output / f"{name}.md").write_text(text)
        plot_pairs(
            [LABELS[model] for model in args.models],
            [accuracies(runs, model, mesa=False) for model in args.models],
            [accuracies(runs, model, mesa=True) for model in args.models],
            names=("without MESA", "with MESA"),
            title=f"Fashion-MNIST, {budget}",
            picture=args.output / f"{name}.png",
        )
    print(text)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    study.add_arguments(parser, "output/mesa")
    parser.add_argument("--models", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--epochs", type=at_least(1), help="override TRAIN.EPOCHS of cfgs/mesa/mlla.yaml")
    parser.add_argument("--equal-time", action="store_true", help="as many epochs as take MLLA's time without MESA")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="concurrent runs, which GPUs take in turns")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="settings that override all files"
    )
    return parser.parse_args(argv)


def config_file(model: str) -> Path:
    return ROOT / "cfgs" / "mesa" / f"{model}.yaml"


def runs_of(args: argparse.Namespace, budget: str) -> list[MesaRun]:
    """Return the recorded runs of a budget with the seeds, precision and models of the command line."""
    runs = study.read_results(args.output / "results.jsonl", MesaRun)
    return [
        run
        for run in runs
        if (run.budget, run.amp) == (budget, args.amp) and run.seed in args.seeds and run.model in args.models
    ]


def epochs_by_group(args: argparse.Namespace, steps: Sequence[MesaRun]) -> dict[tuple[str, bool], int]:
    """Return the epochs of each model, with and without MESA.

    Raises:
        UserError: with --equal-time, runs of equal steps are missing, from which the speeds are.
    """
    epochs = args.epochs or load_config(config_file("mlla")).TRAIN.EPOCHS
    groups = [(model, mesa) for model in args.models for mesa in MESA]
    if not args.equal_time:
        return dict.fromkeys(groups, epochs)
    seconds: dict[tuple[str, bool], list[float]] = {}
    for run in steps:
        seconds.setdefault((run.model, run.mesa), []).append(run.epoch_seconds)
    if missing := [model for model, mesa in [("mlla", False), *groups] if (model, mesa) not in seconds]:
        raise UserError(f"--equal-time: no runs of equal steps of {missing[0]}; run the command without it first")
    reference = statistics.median(seconds["mlla", False])
    return {group: max(2, round(epochs * reference / statistics.median(seconds[group]))) for group in groups}


def train_missing(args: argparse.Namespace, epochs: dict[tuple[str, bool], int]) -> int:
    """Train the runs that have no result; return how many are still missing."""
    budget = "equal time" if args.equal_time else "equal steps"
    done = {(run.model, run.mesa, run.seed) for run in runs_of(args, budget)}
    todo = {
        f"{model}, MESA {'on' if mesa else 'off'}, seed {seed}": (model, mesa, seed)
        for seed in args.seeds
        for model, mesa in epochs
        if (model, mesa, seed) not in done
    }

    def read_result(job: Job, _seconds: float) -> dict[str, Any] | None:
        model, mesa, seed = todo[job.name]
        metrics, speeds = (read_records(job.folder / name) for name in ("metrics.jsonl", "speed.jsonl"))
        if len(metrics) < epochs[model, mesa]:
            return None
        last, seconds = metrics[-1], statistics.median(record["train_seconds"] for record in speeds)
        group = (model, mesa, seed, budget, epochs[model, mesa], args.amp)
        return MesaRun(*group, last["acc1"], last["ema_acc1"], seconds)._asdict()

    return run_jobs(
        [make_job(args, name, *group, epochs[group[:2]]) for name, group in todo.items()],
        read_result,
        lambda run: f"{run['model']}, MESA {run['mesa']}, seed {run['seed']}: {run['acc1']:.2f}%",
        results=args.output / "results.jsonl",
        num_parallel=args.jobs,
        minutes=args.minutes,
        OMP_NUM_THREADS="1",
    )


def make_job(args: argparse.Namespace, name: str, model: str, mesa: bool, seed: int, epochs: int) -> Job:
    output, path = (args.output / "runs").resolve(), config_file(model)
    tag = f"mesa{MESA[mesa]:g}_epochs{epochs}_seed{seed}{'_amp' if args.amp else ''}"
    command = ["--cfg", str(path), "--output", str(output), "--tag", tag, *(["--amp"] if args.amp else [])]
    command += ["--opts", *args.opts, "SEED", str(seed), "TRAIN.EPOCHS", str(epochs), "AUG.MESA", str(MESA[mesa])]
    return Job(name, command, output / load_config(path).MODEL.NAME / tag)


def accuracies(runs: Sequence[MesaRun], model: str, *, mesa: bool) -> list[float]:
    return [run.accuracy for run in runs if (run.model, run.mesa) == (model, mesa)]


def results_table(models: Sequence[str], runs: Sequence[MesaRun]) -> str:
    """Return a Markdown table: accuracies (mean and standard deviation over seeds) and what MESA adds."""
    lines = [
        "| model | epochs | without MESA | with MESA | MESA adds (95% interval) | p |",
        "|---|---|---|---|---|---|",
    ]
    pairs = {model: {str(mesa): accuracies(runs, model, mesa=mesa) for mesa in MESA} for model in models}
    has_seeds = all(len(values) > 1 for pair in pairs.values() for values in pair.values())
    found = {model: differences(pair)["True"] for model, pair in pairs.items()} if has_seeds else {}
    p_values = dict(zip(found, holm([difference.p for difference in found.values()]), strict=True))
    for model, pair in pairs.items():
        cells = [mean_text(values) for values in pair.values()]
        epochs = [next(run.epochs for run in runs if (run.model, run.mesa) == (model, mesa)) for mesa in MESA]
        if found:
            cells += found[model]._replace(p=p_values[model]).cells()
        else:
            cells += [f"{statistics.mean(pair['True']) - statistics.mean(pair['False']):+.2f}", ""]
        lines.append(f"| {LABELS[model]} | {', '.join(map(str, dict.fromkeys(epochs)))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_text(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    sys.exit(main())

"""Compare settings for fine-tuning: cfgs/finetune.yaml, no pretraining, a frozen backbone, the paper's recipe.

python -m utils.finetune_study --jobs 8                    Fashion-MNIST and digits, five seeds each
python -m utils.finetune_study --jobs 8 --settings all     also finetune.yaml with one setting changed at a time
python -m utils.finetune_study --minutes 25                start no run after 25 minutes; the same command resumes

A small MLLA is pretrained on five classes of Fashion-MNIST, then trained at another size on 2,000 other images of all
ten, or on 1,000 handwritten digits. Every seed draws other images. Each run is a process of main.py. Finished runs are
recorded in <output>/results.jsonl and skipped; others resume.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from config import load_config
from data.sources.digits import Digits
from data.sources.idx import IdxImages
from models.ablation_statistics import differences
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError, file_errors
from utils.logs.recorder import read_records
from utils.tools import study
from utils.tools.study import ROOT, Job, run_jobs

STUDY_CFGS = ROOT / "cfgs" / "finetune_study"
PRETRAINING_CLASSES = (0, 1, 4, 5, 8)  # of Fashion-MNIST: T-shirt/top, trouser, coat, sandal, bag
PRETRAINING_VAL = 200  # images per class


class Dataset(NamedTuple):
    """A dataset of the study, and how many images per class a seed draws from it."""

    label: str
    num_train: int
    num_val: int


class Settings(NamedTuple):
    """Settings to compare: a configuration, changes to it, and whether a run starts from pretrained weights."""

    label: str
    opts: str = ""
    cfg: str = "finetune.yaml"
    is_pretrained: bool = True


DATASETS = {
    "fashion": Dataset("Fashion-MNIST", 200, 100),
    "digits": Dataset("Digits", 100, 35),
}
SCRATCH = "MODEL.LAYER_DECAY 1.0 TRAIN.WEIGHT_DECAY 0.05 TRAIN.BASE_LR 1.6e-2 TRAIN.WARMUP_LR 1e-5 TRAIN.MIN_LR 1e-5"
SETTINGS = {
    "finetune": Settings("`cfgs/finetune.yaml`"),
    "scratch": Settings("from scratch, 5 times the rate, no layer decay", SCRATCH, is_pretrained=False),
    "frozen": Settings("`--freeze-backbone`", "TRAIN.FREEZE True"),
    "frozen_fast": Settings("`--freeze-backbone`, 5 times the rate", "TRAIN.FREEZE True TRAIN.BASE_LR 1.6e-2"),
    "recipe": Settings("`cfgs/mlla_t.yaml`", "TRAIN.WARMUP_EPOCHS 2", "mlla_t.yaml"),
    # Below: finetune.yaml with one setting changed.
    "no_layer_decay": Settings("no layer decay", "MODEL.LAYER_DECAY 1.0"),
    "lower_rate": Settings("a quarter of the rate", "TRAIN.BASE_LR 8e-4"),
    "higher_rate": Settings("4 times the rate", "TRAIN.BASE_LR 1.28e-2"),
    "batch_128": Settings("batch size 128", "DATA.BATCH_SIZE 128"),
    "drop_path": Settings("drop path 0.2", "MODEL.DROP_PATH_RATE 0.2"),
    "weight_decay": Settings("weight decay 0.05", "TRAIN.WEIGHT_DECAY 0.05"),
    "mixing": Settings("mixup 0.8, cutmix 1.0", "AUG.MIXUP 0.8 AUG.CUTMIX 1.0"),
    "mesa": Settings("MESA 1.0", "AUG.MESA 1.0"),
}
MAIN_SETTINGS = ["finetune", "scratch", "frozen", "recipe"]


class Run(NamedTuple):
    """A run of the study: names of its dataset and settings, seed."""

    dataset: str
    settings: str
    seed: int


PRETRAINING = Run("fashion", "pretrain", 0)


class Result(NamedTuple):
    """A finished run: top-1 in percent and losses of model and EMA after its last epoch, and the seconds it took."""

    dataset: str
    settings: str
    seed: int
    epochs: int
    amp: bool
    acc1: float
    ema_acc1: float
    loss: float
    ema_loss: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Accuracy of the better weights, which all commands use."""
        return max(self.acc1, self.ema_acc1)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    with report_user_errors(), file_errors(UserError, args.output, "written", "choose another --output"):
        for dataset in args.datasets:
            write_configs(args, dataset)
            write_images(args, dataset)
        left = 0
        if not pretrained_weights(args).exists():
            write_pretraining_images(args)
            left = train(args, [PRETRAINING], deadline)
        if not left:
            done = {(result.dataset, result.settings, result.seed) for result in read_results(args)}
            runs = [Run(*names, seed) for seed in args.seeds for names in compared(args)]
            left = train(args, [run for run in runs if run not in done], deadline)
        results = read_results(args)
        text = "\n".join(results_table(dataset, args.settings, results) for dataset in args.datasets)
        (args.output / "results.md").write_text(text)
    print(text)
    if left:
        print(f"{left} runs left; run the same command again to resume")
        return 3
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    study.add_arguments(parser, "output/finetune_study")
    parser.add_argument("--data-path", default="/usr/share/datasets/fashion-mnist", help="Fashion-MNIST's four files")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--settings", nargs="+", default=MAIN_SETTINGS, choices=["all", *SETTINGS])
    parser.add_argument("--epochs", type=at_least(1), help="override TRAIN.EPOCHS of cfgs/finetune.yaml")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="concurrent runs, which GPUs take in turns")
    args = parser.parse_args(argv)
    if "all" in args.settings:
        args.settings = list(SETTINGS)
    args.epochs = args.epochs or load_config(ROOT / "cfgs" / "finetune.yaml").TRAIN.EPOCHS
    return args


def compared(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return dataset and settings of all runs of a seed."""
    return [(dataset, settings) for settings in args.settings for dataset in args.datasets]


def cfg_of(args: argparse.Namespace, run: Run) -> Path:
    """Return the configuration of a run; write_configs writes those that are compared."""
    if run == PRETRAINING:
        return STUDY_CFGS / "pretrain.yaml"
    return args.output.resolve() / "cfgs" / f"{run.dataset}_{SETTINGS[run.settings].cfg}"


def write_configs(args: argparse.Namespace, dataset: str) -> None:
    """Write the configurations that are compared: each a file of cfgs/ with the dataset and the small model."""
    for name, settings in SETTINGS.items():
        path = cfg_of(args, Run(dataset, name, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        bases = ROOT / "cfgs" / settings.cfg, STUDY_CFGS / f"{dataset}.yaml"
        path.write_text(f"BASE: {json.dumps([str(base) for base in bases])}\n")


def image_folder(args: argparse.Namespace, run: Run) -> Path:
    folder = args.output.resolve() / "images"
    return folder / ("pretrain" if run == PRETRAINING else f"{run.dataset}_seed{run.seed}")


def write_pretraining_images(args: argparse.Namespace) -> None:
    source, of_class = open_dataset(args, PRETRAINING.dataset)
    own = [of_class[label][::2] for label in PRETRAINING_CLASSES]
    splits = {"train": [i[PRETRAINING_VAL:] for i in own], "val": [i[:PRETRAINING_VAL] for i in own]}
    write_folder(source, splits, image_folder(args, PRETRAINING))


def write_images(args: argparse.Namespace, name: str) -> None:
    """Write an image folder per seed, of images that pretraining does not have."""
    dataset, (source, of_class) = DATASETS[name], open_dataset(args, name)
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        pools = [indices[1::2] if name == PRETRAINING.dataset else indices for indices in of_class]
        drawn = [rng.permutation(pool)[: dataset.num_train + dataset.num_val] for pool in pools]
        splits = {"train": [i[: dataset.num_train] for i in drawn], "val": [i[dataset.num_train :] for i in drawn]}
        write_folder(source, splits, image_folder(args, Run(name, "", seed)))


def open_dataset(args: argparse.Namespace, name: str) -> tuple[Digits | IdxImages, list[np.ndarray]]:
    """Return the training images of a dataset, and the indices of each class."""
    source = Digits("train") if name == "digits" else IdxImages(args.data_path, "train")
    labels = np.asarray(source.labels)
    return source, [np.flatnonzero(labels == label) for label in range(len(source.classes))]


def write_folder(source: Digits | IdxImages, splits: Mapping[str, Sequence[np.ndarray]], folder: Path) -> None:
    """Write images as <folder>/<split>/<class>/<index>.png, whole or not at all, unless the folder is there.

    Args:
        source: images and labels.
        splits: indices of the images by name of the split; an array per class.
        folder: folder to make.
    """
    if folder.exists():
        return
    temporary = folder.with_name("unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    for split, classes in splits.items():
        for indices in classes:
            path = temporary / split / source.classes[source.labels[indices[0]]].replace("/", " or ")
            path.mkdir(parents=True)
            for index in indices:
                content = source.read(index)
                image = content if isinstance(content, Image.Image) else Image.fromarray(content.numpy())
                image.save(path / f"{index:05d}.png")
    temporary.rename(folder)


def num_epochs(args: argparse.Namespace, run: Run) -> int:
    return load_config(cfg_of(args, run)).TRAIN.EPOCHS if run == PRETRAINING else args.epochs


def pretrained_weights(args: argparse.Namespace) -> Path:
    """Return the path of the last checkpoint of pretraining."""
    return make_job(args, PRETRAINING).folder / f"ckpt_epoch_{num_epochs(args, PRETRAINING) - 1}.pth"


def make_job(args: argparse.Namespace, run: Run) -> Job:
    cfg, output = cfg_of(args, run), (args.output / "runs").resolve()
    tag = f"{run.settings}_epochs{num_epochs(args, run)}_seed{run.seed}{'_amp' if args.amp else ''}"
    command = ["--cfg", str(cfg), "--data-path", str(image_folder(args, run)), "--output", str(output), "--tag", tag]
    command += ["--amp"] if args.amp else []
    opts = ["SEED", str(run.seed), "TRAIN.EPOCHS", str(num_epochs(args, run))]
    if run != PRETRAINING:
        settings = SETTINGS[run.settings]
        opts += settings.opts.split()
        command += ["--pretrained", str(pretrained_weights(args))] if settings.is_pretrained else []
    name = f"{run.dataset}, {run.settings}, seed {run.seed}"
    return Job(name, [*command, "--opts", *opts], output / load_config(cfg).MODEL.NAME / tag)


def train(args: argparse.Namespace, runs: Sequence[Run], deadline: float) -> int:
    """Train runs, and append their results to results.jsonl; return how many could not be finished in time."""
    jobs = {(job := make_job(args, run)).name: (job, run) for run in runs}

    def read_result(job: Job, seconds: float) -> dict[str, Any] | None:
        _, run = jobs[job.name]
        metrics = read_records(job.folder / "metrics.jsonl")
        if len(metrics) < num_epochs(args, run):
            return None
        scores = {key: metrics[-1][key] for key in ("acc1", "ema_acc1", "loss", "ema_loss")}
        return {**run._asdict(), "epochs": num_epochs(args, run), "amp": args.amp, **scores, "seconds": seconds}

    return run_jobs(
        [job for job, _ in jobs.values()],
        read_result,
        lambda run: (
            f"{run['dataset']}, {run['settings']}, seed {run['seed']}: model {run['acc1']:.2f}%, "
            f"EMA {run['ema_acc1']:.2f}%, {run['seconds']:.0f} s"
        ),
        results=args.output / "results.jsonl",
        num_parallel=args.jobs,
        minutes=(deadline - time.monotonic()) / 60,
        OMP_NUM_THREADS="1",
    )


def read_results(args: argparse.Namespace) -> list[Result]:
    """Return the results of fine-tuning that the command line asks for."""
    results = study.read_results(args.output / "results.jsonl", Result)
    asked = {Run(*names, seed) for names in compared(args) for seed in args.seeds}
    return [
        result
        for result in results
        if (result.epochs, result.amp) == (args.epochs, args.amp)
        and Run(result.dataset, result.settings, result.seed) in asked
    ]


def results_table(dataset: str, settings: Sequence[str], results: Sequence[Result]) -> str:
    """Return a Markdown table of settings with results: accuracy, loss, and the difference from the first ones."""
    by_name = {name: [run for run in results if (run.dataset, run.settings) == (dataset, name)] for name in settings}
    by_name = {name: runs for name, runs in by_name.items() if runs}
    accuracies = {name: [run.accuracy for run in runs] for name, runs in by_name.items()}
    has_seeds = all(len(values) > 1 for values in accuracies.values())
    found = differences(accuracies) if accuracies and has_seeds else {}
    lines = [
        f"| {DATASETS[dataset].label} | seeds | top-1 | difference (95% interval) | p | validation loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in by_name.items():
        spread = f" ± {statistics.stdev(accuracies[name]):.2f}" if has_seeds else ""
        cells = [SETTINGS[name].label, str(len(runs)), f"{statistics.mean(accuracies[name]):.2f}{spread}", "", ""]
        if name in found:
            cells[3:] = found[name].cells()
        losses = [run.loss if run.acc1 >= run.ema_acc1 else run.ema_loss for run in runs]
        lines.append(f"| {' | '.join(cells)} | {statistics.mean(losses):.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

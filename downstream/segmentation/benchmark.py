"""Speed of UperNet with MLLA and with timm backbones of its size in the same head, on synthetic images, in one run.

python -m downstream.segmentation.benchmark --amp --output segmentation_speed.jsonl
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from downstream.segmentation.build import build_model
from downstream.segmentation.config import load_config
from downstream.segmentation.task import Segmentation
from utils.benchmark.measure import chip_name, median_seconds, reset_peak_memory, run_calls, synthetic_images
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError, file_errors
from utils.config.schema import with_setting
from utils.distributed.process import Process
from utils.logs.plots import plot_bars
from utils.speed.compile import GRAPHS, INDUCTOR_MODES
from utils.speed.memory import peak_memory_mib
from utils.training.amp import Precision, make_precision
from utils.training.build import build_optimizer, build_train_step
from utils.training.inference import InferenceModel
from utils.training.launch import MissingCompilerError, explain_missing_compiler, run_and_end
from utils.training.train_step import TrainStep

BACKBONES = ("mlla", "timm:swin_tiny_patch4_window7_224", "timm:convnext_tiny")
NUM_CLASSES = 150
NUM_TRAIN_IMAGES = 20_210  # of ADE20K
WARMUP_CALLS = 6  # the first steps are recorded
COMPILE_MODES = ("off", GRAPHS, *INDUCTOR_MODES)
HEAD = (
    "| backbone | work | size | batch | images/s | ms | times the first's speed | peak MiB |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Row:
    """One line of the table; memory is the peak of PyTorch's allocator on a GPU."""

    task: str
    batch: int
    height: int
    width: int
    backbone: str
    precision: str
    images_per_second: float
    milliseconds: float
    ratio: float  # of images per second, to the first backbone's
    memory_mib: float | None
    chip: str
    torch: str
    rounds: int


@dataclass(frozen=True)
class Measure:
    """A measurement, repeated for every backbone."""

    task: str  # "train" or "inference"
    batch: int
    size: tuple[int, int]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with report_user_errors((UserError, MissingCompilerError)):
        config = load_config(args.cfg)
        for backbone in args.backbones:
            load_config(args.cfg, flags={"MODEL.TYPE": backbone})
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        measures = [Measure("train", batch, tuple(args.train_size)) for batch in args.train_batches]
        measures.append(Measure("inference", 1, tuple(args.test_size)))
        precision = make_precision(device, amp=args.amp, dtype=config.AMP_DTYPE)
        print(f"{chip_name(device)}, torch {torch.__version__}, {precision.name}\n", *HEAD, sep="\n", flush=True)
        all_rows: list[Row] = []
        for measure in measures:
            with explain_missing_compiler("--compile"):
                rows = compare(measure, args, device, precision)
            print(*map(line_of, rows), sep="\n", flush=True)
            all_rows += rows
            if args.output is not None:
                with file_errors(UserError, args.output, "written"), args.output.open("a") as file:
                    file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
        if args.output is not None:
            with file_errors(UserError, args.output, "written"):
                draw_bars(all_rows, args.output.with_suffix(".png"))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    cfg = Path(__file__).with_name("cfgs") / "mlla_t_upernet.yaml"
    parser.add_argument("--cfg", default=str(cfg), metavar="FILE", help="YAML file of MLLA and the head; MLLA-T")
    parser.add_argument(
        "--backbones", nargs="+", default=BACKBONES, metavar="TYPE", help="mlla, timm:NAME; first: ratio 1"
    )
    parser.add_argument(
        "--train-batches", nargs="*", type=at_least(1), default=[2, 16], metavar="NUMBER", help="images a step"
    )
    parser.add_argument(
        "--train-size", nargs=2, type=at_least(1), default=[512, 512], metavar="PIXELS", help="height, width"
    )
    parser.add_argument(
        "--test-size", nargs=2, type=at_least(1), default=[512, 2048], metavar="PIXELS", help="height, width"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, metavar="NUMBER", help="rounds, of which the median counts"
    )
    parser.add_argument(
        "--round-seconds", type=float, default=0.6, metavar="SECONDS", help="approximate length of a round"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--compile", choices=COMPILE_MODES, default=GRAPHS, help="TRAIN.COMPILE and TEST.COMPILE; %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the rows, one JSON object a line; chart: .png"
    )
    return parser.parse_args(argv)


def compare(measure: Measure, args: argparse.Namespace, device: torch.device, precision: Precision) -> list[Row]:
    """Time all backbones in turns, round by round, so that a disturbance of the machine affects all of them."""
    calls: dict[str, Callable[[], None]] = {}
    memory: dict[str, float | None] = {}
    for backbone in args.backbones:
        config = load_config(args.cfg, flags={"MODEL.TYPE": backbone, "DATA.BATCH_SIZE": measure.batch})
        config = with_setting(config, "TRAIN.COMPILE", args.compile)
        reset_peak_memory(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        calls[backbone] = prepare(measure, config, device, precision)
        run_calls(calls[backbone], device, WARMUP_CALLS)
        memory[backbone] = peak_memory_mib(device) - before / 2**20 if device.type == "cuda" else None
    timings = median_seconds(calls, device, rounds=args.rounds, round_seconds=args.round_seconds, warmup=0)
    medians = {backbone: seconds for backbone, (seconds, _) in timings.items()}
    first = medians[args.backbones[0]]
    return [
        Row(
            task=measure.task,
            batch=measure.batch,
            height=measure.size[0],
            width=measure.size[1],
            backbone=backbone,
            precision=precision.name,
            images_per_second=measure.batch / seconds,
            milliseconds=1000 * seconds,
            ratio=first / seconds,
            memory_mib=memory[backbone],
            chip=chip_name(device),
            torch=str(torch.__version__),
            rounds=args.rounds,
        )
        for backbone, seconds in medians.items()
    ]


def prepare(measure: Measure, config: CfgNode, device: torch.device, precision: Precision) -> Callable[[], None]:
    """Return the function to time: a run's training step, or inference from images to classes of all pixels."""
    torch.manual_seed(0)
    task, process = Segmentation(), Process(0, 1, device)
    model = build_model(config, NUM_CLASSES).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = synthetic_images(measure.batch, measure.size, device)
    if measure.task == "inference":
        prepared = InferenceModel(task, config.TRAIN.COMPILE, device, precision.dtype)(model)
        return partial(infer, prepared, images, precision)
    labels = torch.randint(NUM_CLASSES, (measure.batch, *measure.size), device=device)
    derived = task.derive(config, num_processes=1, num_train_images=NUM_TRAIN_IMAGES)
    optimizer = build_optimizer(config, task.parameter_groups(config, model))
    step = build_train_step(task, config, model.train(), process, optimizer, None, precision, derived)
    return partial(train, step, images, labels)


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor, precision: Precision) -> None:
    with precision.autocast():
        model(images).argmax(dim=1)


def train(step: TrainStep, images: Tensor, labels: Tensor) -> None:
    step([(images, labels)], step=0, learning_rate=1e-6)


def draw_bars(rows: Sequence[Row], path: Path) -> None:
    """Draw the images per second of each kind of work, MLLA's in blue."""
    first = rows[0]
    plot_bars(
        [f"{row.task}, {row.height}x{row.width}, batch {row.batch}: {row.backbone}" for row in rows],
        [row.images_per_second for row in rows],
        colors=["tab:blue" if row.backbone == "mlla" else "tab:gray" for row in rows],
        axis_label="images per second",
        title=f"UperNet, {first.chip}, torch {first.torch}, {first.precision}",
        path=path,
    )


def line_of(row: Row) -> str:
    memory = "" if row.memory_mib is None else f"{row.memory_mib:.0f}"
    return (
        f"| {row.backbone} | {row.task} | {row.height}x{row.width} | {row.batch} | {row.images_per_second:.1f} "
        f"| {row.milliseconds:.1f} | {row.ratio:.2f} | {memory} |"
    )


if __name__ == "__main__":
    run_and_end(main)

"""Speed of UperNet with MLLA and with timm backbones of its size in the same head, on synthetic images, in one run.

python -m downstream.segmentation.benchmark --amp --output segmentation_speed.jsonl
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from downstream.segmentation.build import build_model
from downstream.segmentation.config import load_config
from downstream.segmentation.model.losses import segmentation_loss
from utils.benchmark.measure import peak_memory_mib, synchronize
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.training.amp import Precision, make_precision
from utils.training.optimizer import make_optimizer
from utils.training.recipe import parameter_groups
from utils.training.train_step import TrainStep

BACKBONES = ("mlla", "timm:swin_tiny_patch4_window7_224", "timm:convnext_tiny")
NUM_CLASSES = 150
WARMUP_CALLS = 2


@dataclass(frozen=True)
class Row:
    """One line of the table; memory is the most that PyTorch held on the GPU, or the whole process's on a CPU."""

    task: str
    batch: int
    height: int
    width: int
    backbone: str
    precision: str
    images_per_second: float
    milliseconds: float
    ratio: float  # of images per second to the first backbone's
    memory_mib: float | None
    chip: str
    torch: str
    rounds: int


@dataclass(frozen=True)
class Measure:
    """What is timed for every backbone."""

    task: str  # "train" or "infer"
    batch: int
    size: tuple[int, int]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    with report_user_errors():
        config = load_config(arguments.cfg)
        for backbone in arguments.backbones:
            load_config(arguments.cfg, flags={"MODEL.TYPE": backbone})
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        measures = [Measure("train", batch, tuple(arguments.train_size)) for batch in arguments.train_batches]
        measures.append(Measure("infer", 1, tuple(arguments.test_size)))
        for measure in measures:
            rows = compare(
                measure, arguments, device, make_precision(device, amp=arguments.amp, dtype=config.AMP_DTYPE)
            )
            print(table(rows), flush=True)
            if arguments.output is not None:
                with arguments.output.open("a") as file:
                    file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
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
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="NUMBER", help="of which the median counts")
    parser.add_argument("--round-seconds", type=float, default=0.6, metavar="SECONDS", help="about, of each round")
    parser.add_argument("--amp", action="store_true", help="16-bit autocast")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the rows, one JSON object a line")
    return parser.parse_args(argv)


def compare(measure: Measure, arguments: argparse.Namespace, device: torch.device, precision: Precision) -> list[Row]:
    """Time all backbones in turn, round by round, so that what disturbs the machine disturbs all of them."""
    calls, counts, memory = {}, {}, {}
    for backbone in arguments.backbones:
        config = load_config(arguments.cfg, flags={"MODEL.TYPE": backbone})
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        calls[backbone] = prepare(measure, config, device, precision)
        seconds_of(calls[backbone], WARMUP_CALLS, device)
        counts[backbone] = max(1, round(arguments.round_seconds / seconds_of(calls[backbone], 1, device)))
        memory[backbone] = peak_memory_mib(device) - before / 2**20 if device.type == "cuda" else None
    times: dict[str, list[float]] = {backbone: [] for backbone in arguments.backbones}
    for _ in range(arguments.rounds):
        for backbone, call in calls.items():
            times[backbone].append(seconds_of(call, counts[backbone], device) / counts[backbone])
    medians = {backbone: statistics.median(values) for backbone, values in times.items()}
    first = medians[arguments.backbones[0]]
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
            chip=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            torch=str(torch.__version__),
            rounds=arguments.rounds,
        )
        for backbone, seconds in medians.items()
    ]


def prepare(measure: Measure, config: CfgNode, device: torch.device, precision: Precision) -> Callable[[], None]:
    """What is called again and again: a training step with optimizer, or a forward pass to logits of all pixels."""
    torch.manual_seed(0)
    model: nn.Module = build_model(config, NUM_CLASSES)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(measure.batch, 3, *measure.size, device=device).contiguous(memory_format=torch.channels_last)
    if measure.task == "infer":
        return partial(infer, model.eval(), images, precision)
    labels = torch.randint(NUM_CLASSES, (measure.batch, *measure.size), device=device)
    step = TrainStep(
        model.train(),
        make_optimizer("adamw", parameter_groups(model, config.TRAIN.WEIGHT_DECAY)),
        precision,
        compute_losses=lambda batch, _: {"loss": segmentation_loss(model(batch[0]), batch[1]).total},
    )
    return partial(train, step, images, labels)


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor, precision: Precision) -> None:
    with precision.autocast():
        model(images).argmax(dim=1)


def train(step: TrainStep, images: Tensor, labels: Tensor) -> None:
    step([(images, labels)], step=0, learning_rate=1e-6)


def seconds_of(call: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds that `count` calls take, all work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return time.perf_counter() - start


def table(rows: Sequence[Row]) -> str:
    """Rows in columns, under a heading that says what they have in common."""
    one = rows[0]
    heading = f"{one.task}, {one.height}x{one.width}, batch {one.batch}, {one.precision}, {one.chip}, torch {one.torch}"
    lines = [heading, f"{'backbone':<38}{'img/s':>9}{'ms':>9}{'ratio':>8}{'MiB':>8}"]
    for row in rows:
        memory = "-" if row.memory_mib is None else f"{row.memory_mib:.0f}"
        speeds = f"{row.images_per_second:>9.1f}{row.milliseconds:>9.1f}{row.ratio:>8.2f}"
        lines.append(f"{row.backbone:<38}{speeds}{memory:>8}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

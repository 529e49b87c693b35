"""Speed of Mask R-CNN with MLLA and with other backbones, and of torchvision's own, on synthetic images.

python -m downstream.detection.benchmark --amp --output output/detection_speed.md
python -m downstream.detection.benchmark --amp --models mlla_t --evaluation 5000
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from yacs.config import CfgNode

from downstream.detection.build import build_detector
from downstream.detection.config import load_config
from downstream.detection.data.dataset import Batch
from downstream.detection.evaluation_speed import (
    HEAD,
    SETTINGS,
    WARMUP_IMAGES,
    Lap,
    line_of_lap,
    measure_lap,
    write_images,
)
from downstream.detection.model.masks import paste_masks
from downstream.detection.model.structures import Target
from downstream.detection.synthetic import NUM_CLASSES, FixedDetections, synthetic_inputs
from downstream.detection.task import Detection
from utils.benchmark.measure import chip_name, median_seconds, reset_peak_memory
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError, file_errors
from utils.config.schema import with_setting
from utils.distributed.process import Process
from utils.logs.plots import plot_bars
from utils.speed.compile import compile_regions, resolve_inference_mode
from utils.speed.inference_graphs import InferenceGraphs
from utils.speed.memory import peak_memory_mib
from utils.training.amp import Precision, make_precision
from utils.training.build import build_optimizer, build_train_step, is_captured
from utils.training.inference import InferenceModel
from utils.training.launch import MissingCompilerError, explain_missing_compiler, run_and_end
from utils.training.task import Run

CFGS = Path(__file__).parent / "cfgs"
TORCHVISION = "torchvision"
MODELS = ("mlla_t", "mlla_s", "mlla_b", "timm:swin_tiny_patch4_window7_224", "timm:convnext_tiny", TORCHVISION)
WARMUP_CALLS, ROUNDS = 6, 5  # the first steps of a size are recorded
NUM_TRAIN_IMAGES = 117_266  # of COCO, with objects


class Row(NamedTuple):
    """One measurement; the backbone's share of the time is in percent, 0 images per second mean out of memory."""

    model: str
    mode: str
    batch: int
    images_per_second: float
    backbone_share: float | None
    memory_mib: float
    note: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="mlla_t, mlla_s, mlla_b, timm:NAME, torchvision"
    )
    parser.add_argument("--train-batches", nargs="*", type=at_least(1), default=[2, 16])
    parser.add_argument("--test-batches", nargs="*", type=at_least(1), default=[1])
    parser.add_argument("--height", type=at_least(1), default=800)
    parser.add_argument("--width", type=at_least(1), default=1333)
    parser.add_argument("--seconds", type=float, default=1.0, help="approximate length of each measurement")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--evaluation", type=at_least(1), metavar="IMAGES", help="only time a whole evaluation of so many image files"
    )
    parser.add_argument("--compile", action="store_true", help="also with a compiled backbone, except torchvision's")
    parser.add_argument(
        "--output", type=Path, help="file for the table; the same name with .png: chart, unless --evaluation"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = make_precision(device, amp=args.amp, dtype="auto")
    if args.evaluation:
        return time_evaluations(args, device, precision)
    lines = [
        f"{chip_name(device)}, torch {torch.__version__}, {precision.name}, {args.height}x{args.width}",
        "",
        "| detector | mode | batch | images/s | backbone | peak MiB | |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    rows: list[Row] = []
    for name in args.models:
        with report_user_errors():
            bench = Bench(name, (args.height, args.width), device, precision, args.seconds)
        for is_compiled in (False, True) if args.compile and name != TORCHVISION else (False,):
            if is_compiled:
                bench.compile()
            jobs = [(bench.train, n) for n in args.train_batches] + [(bench.detect, n) for n in args.test_batches]
            for job, batch in jobs:
                with report_user_errors((MissingCompilerError,)), explain_missing_compiler("--compile"):
                    rows.append(job(batch))
                print(line_of(rows[-1]), flush=True)
    if args.output:
        with report_user_errors(), file_errors(UserError, args.output, "written"):
            write_lines(args.output, [*lines, *map(line_of, rows)])
            draw_bars(rows, args.output.with_suffix(".png"), title=lines[0])
    return 0


def time_evaluations(args: argparse.Namespace, device: torch.device, precision: Precision) -> int:
    """Print how long an evaluation of each model takes; torchvision's detector has none."""
    with report_user_errors():
        if set(args.models) == {TORCHVISION}:
            raise UserError("--models torchvision: its detector has no --evaluation here; add another, such as mlla_t")
    lines = [f"{chip_name(device)}, torch {torch.__version__}, {precision.name}", "", *HEAD]
    print("\n".join(lines), flush=True)
    for name in args.models:
        if name != TORCHVISION:
            with report_user_errors():
                bench = Bench(name, (args.height, args.width), device, precision, args.seconds)
            for lap in bench.evaluate(args.evaluation):
                lines.append(line_of_lap(name, lap))
                print(lines[-1], flush=True)
    if args.output:
        with report_user_errors(), file_errors(UserError, args.output, "written"):
            write_lines(args.output, lines)
    return 0


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def draw_bars(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw the images per second of each kind of work, MLLA's in blue."""
    rows = sorted(rows, key=lambda row: (row.mode, row.batch))
    plot_bars(
        [f"{row.mode}, batch {row.batch}: {row.model}" for row in rows],
        [row.images_per_second for row in rows],
        colors=["tab:blue" if row.model.startswith("mlla") else "tab:gray" for row in rows],
        axis_label="images per second",
        title=f"Mask R-CNN, {title}",
        path=path,
    )


def line_of(row: Row) -> str:
    share = "" if row.backbone_share is None else f"{row.backbone_share:.0f}%"
    speed = f"{row.images_per_second:.1f}" if row.images_per_second else "out of memory"
    return f"| {row.model} | {row.mode} | {row.batch} | {speed} | {share} | {row.memory_mib:.0f} | {row.note} |"


class Bench:
    """One detector, timed at training and at inference; inputs are on the device already.

    Args:
        name: one of MODELS, or another timm:NAME.
        size: height and width of the images.
        device: where the detector runs.
        precision: its autocast.
        seconds: approximate length of each measurement.
    """

    def __init__(
        self, name: str, size: tuple[int, int], device: torch.device, precision: Precision, seconds: float
    ) -> None:
        self.name = name
        self.size = size
        self.device = device
        self.precision = precision
        self.seconds = seconds
        self.is_torchvision = name == TORCHVISION
        self.config = self.load_config()
        self.inference_mode = resolve_inference_mode(self.config.TEST.COMPILE, device)
        torch.manual_seed(0)
        self.model = self.make_model().to(device)
        self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def make_model(self) -> nn.Module:
        if self.is_torchvision:
            return maskrcnn_resnet50_fpn(
                weights=None,
                weights_backbone=None,
                num_classes=NUM_CLASSES + 1,
                min_size=min(self.size),
                max_size=max(self.size),
            )
        return build_detector(self.config, NUM_CLASSES)

    def load_config(self) -> CfgNode:
        """Return the recipe's configuration; for a backbone of timm, MLLA-T's."""
        opts = ["MODEL.TYPE", self.name] if self.name.startswith("timm:") else []
        path = CFGS / f"{'mlla_t' if opts or self.is_torchvision else self.name}_mrcnn_1x.yaml"
        if path not in CFGS.iterdir():
            raise UserError(f"--models {self.name}: known are {', '.join(MODELS)} and other timm:NAME")
        return load_config(path, opts)

    def compile(self) -> None:
        """Compile the backbone from now on; sizes in the rest depend on the detections."""
        compile_regions(self.model.backbone, "default")  # type: ignore[arg-type]
        self.name += ", compiled"
        self.inference_mode = "reduce-overhead"

    def train(self, batch: int) -> Row:
        """Measure the step of a training run with its defaults; torchvision's detector has forward, backward, AdamW."""
        self.model.train()
        images, frames, targets = synthetic_inputs(batch, self.size, self.device)
        if self.is_torchvision:
            return self.measured("train", batch, self.torchvision_step(images, targets))
        config = with_setting(self.config, "DATA.BATCH_SIZE", batch)
        task, process = Detection(), Process(0, 1, self.device)
        derived = task.derive(config, num_processes=1, num_train_images=NUM_TRAIN_IMAGES)
        optimizer = build_optimizer(config, task.parameter_groups(config, self.model))
        train_step = build_train_step(task, config, self.model, process, optimizer, None, self.precision, derived)
        data = Batch(images, frames, [0] * batch, targets)
        row = self.measured("train", batch, lambda: train_step([data], step=0, learning_rate=1e-6))
        return row._replace(note="CUDA graphs" if is_captured(train_step) else "")

    def torchvision_step(self, images: Tensor, targets: Sequence[Target]) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        cropped = [image[:, : self.size[0], : self.size[1]] for image in images]
        own_targets = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks} for t in targets]

        def step() -> None:
            with self.precision.autocast():
                total = torch.stack(list(self.model(cropped, own_targets).values())).sum()
            total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    @torch.no_grad()
    def detect(self, batch: int) -> Row:
        """Measure inference as in a run: images to boxes, classes and masks of their size; and the backbone's share."""
        images, frames, _ = synthetic_inputs(batch, self.size, self.device)
        as_compiled = InferenceModel(Detection(), self.inference_mode, self.device, self.precision.dtype)
        model: Any = self.model.eval() if self.is_torchvision else as_compiled(self.model)
        cropped = [image[:, : self.size[0], : self.size[1]] for image in images]
        num_detections, kernels = 0, self.config.MODEL.KERNELS

        def step() -> None:
            nonlocal num_detections
            with self.precision.autocast(), torch.no_grad():
                if self.is_torchvision:
                    boxes = [output["boxes"] for output in model(cropped)]
                else:
                    outputs = model.detect(images, frames)
                    boxes = [output.boxes for output in outputs]
                    for output in outputs:
                        paste_masks(output.mask_probabilities, output.boxes, *self.size, kernels=kernels)
            num_detections = sum(map(len, boxes)) // batch

        def find_maps(images: Tensor) -> tuple[Tensor, ...]:
            maps = model.backbone.body(images).values() if self.is_torchvision else model.backbone(images)
            return tuple(maps)  # torchvision's without its feature pyramid

        backbone = InferenceGraphs(find_maps) if as_compiled.graphs else find_maps

        def backbone_step() -> None:
            with self.precision.autocast(), torch.no_grad():
                backbone(images)

        classifier, background = self.classifier(model)
        hook = classifier.register_forward_hook(FixedDetections(batch, background))
        row = self.measured("inference", batch, step, backbone_step)
        hook.remove()
        has_graphs = any(graphs.frequent.recordings for graphs in as_compiled.graphs)
        return row._replace(note=f"{num_detections} detections per image{', CUDA graphs' if has_graphs else ''}")

    def evaluate(self, num_images: int) -> Iterator[Lap]:
        """Measure evaluations as in a run: of a few image files, to compile kernels, then of `num_images`."""
        model: Any = self.model.eval()
        as_compiled = InferenceModel(Detection(), self.inference_mode, self.device, self.precision.dtype)
        classifier, background = self.classifier(model)
        classifier.register_forward_hook(FixedDetections(1, background))
        process, config = Process(0, 1, self.device), self.config
        for count in (min(WARMUP_IMAGES, num_images), num_images):
            with TemporaryDirectory() as folder:
                write_images(Path(folder), count)
                for key, value in {**SETTINGS, "DATA.DATA_PATH": folder}.items():
                    config = with_setting(config, key, value)
                task = Detection()
                run = Run(config, process, Path(folder), task.build_data(config, process), model, self.precision)
                yield measure_lap(task, run, as_compiled)

    def classifier(self, model: Any) -> tuple[nn.Module, int]:
        """Return the box classifier, and the index of the background among its logits."""
        if self.is_torchvision:
            return model.roi_heads.box_predictor.cls_score, 0
        return model.roi_head.bbox_head.fc_cls, NUM_CLASSES

    def measured(
        self, mode: str, batch: int, step: Callable[[], object], part: Callable[[], object] | None = None
    ) -> Row:
        reset_peak_memory(self.device)
        try:
            seconds = self.seconds_of(step)
            memory = peak_memory_mib(self.device)
            share = 100 * self.seconds_of(part) / seconds if part else None
        except torch.OutOfMemoryError:
            return Row(self.name, mode, batch, 0.0, None, 0.0, "")
        finally:
            self.model.zero_grad(set_to_none=True)
        return Row(self.name, mode, batch, batch / seconds, share, memory, "")

    def seconds_of(self, call: Callable[[], object]) -> float:
        round_seconds = self.seconds / ROUNDS
        timings = median_seconds(
            {"": call}, self.device, rounds=ROUNDS, round_seconds=round_seconds, warmup=WARMUP_CALLS
        )
        return timings[""][0]


if __name__ == "__main__":
    run_and_end(main)

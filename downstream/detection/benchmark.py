"""Speed of Mask R-CNN with MLLA and with other backbones, and of torchvision's own, on synthetic images.

python -m downstream.detection.benchmark --amp --output output/detection_speed.md
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from downstream.detection.build import build_detector
from downstream.detection.config import load_config
from downstream.detection.data.transforms import padded_size
from downstream.detection.model.masks import paste_masks
from downstream.detection.model.structures import Frame, Target
from utils.benchmark.measure import synchronize
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import ConfigError
from utils.speed.compile import compile_regions
from utils.training.amp import Precision, make_precision
from utils.training.launch import MissingCompilerError, explain_missing_compiler

CFGS = Path(__file__).parent / "cfgs"
TORCHVISION = "torchvision"
MODELS = ("mlla_t", "mlla_s", "mlla_b", "timm:swin_tiny_patch4_window7_224", "timm:convnext_tiny", TORCHVISION)
OBJECTS = 7  # of an image, as in COCO on average
CLASSES = 80
WARMUP = 3  # steps that do not count
ENOUGH_DETECTIONS, MAX_SHARPENINGS = 90, 8


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
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--amp", action="store_true", help="16-bit autocast")
    parser.add_argument("--compile", action="store_true", help="also with a compiled backbone, but for torchvision's")
    parser.add_argument("--output", type=Path, help="file for the table")
    words = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = make_precision(device, amp=words.amp, dtype="auto")
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    title = f"{chip}, torch {torch.__version__}, {precision.name}, {words.height}x{words.width}"
    lines = [
        title,
        "",
        "| detector | mode | batch | images/s | backbone | peak MiB | |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in words.models:
        with report_user_errors():
            bench = Bench(name, (words.height, words.width), device, precision, words.seconds)
        for is_compiled in (False, True) if words.compile and name != TORCHVISION else (False,):
            if is_compiled:
                bench.compile()
            jobs = [(bench.train, n) for n in words.train_batches] + [(bench.detect, n) for n in words.test_batches]
            for job, batch in jobs:
                with report_user_errors((MissingCompilerError,)), explain_missing_compiler("--compile"):
                    lines.append(line_of(job(batch)))
                print(lines[-1], flush=True)
    if words.output:
        words.output.parent.mkdir(parents=True, exist_ok=True)
        words.output.write_text("\n".join(lines) + "\n")
    return 0


def line_of(row: Row) -> str:
    share = "" if row.backbone_share is None else f"{row.backbone_share:.0f}%"
    speed = f"{row.images_per_second:.1f}" if row.images_per_second else "out of memory"
    return f"| {row.model} | {row.mode} | {row.batch} | {speed} | {share} | {row.memory_mib:.0f} | {row.note} |"


class Bench:
    """One detector, timed at training and at inference; inputs are on the device already.

    Args:
        name: as in MODELS.
        size: height and width of the images.
        seconds: of each measurement; the median of its steps counts.
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
        torch.manual_seed(0)
        self.model = self.make_model().to(device)
        self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def make_model(self) -> nn.Module:
        if self.is_torchvision:
            return maskrcnn_resnet50_fpn(
                weights=None,
                weights_backbone=None,
                num_classes=CLASSES + 1,
                min_size=min(self.size),
                max_size=max(self.size),
            )
        opts = ["MODEL.TYPE", self.name] if self.name.startswith("timm:") else []
        path = CFGS / f"{'mlla_t' if opts else self.name}_mrcnn_1x.yaml"
        if not path.is_file():
            raise ConfigError(f"--models {self.name}: known are {', '.join(MODELS)} and other timm:NAME")
        return build_detector(load_config(path, opts), CLASSES)

    def compile(self) -> None:
        """Compile the backbone as TRAIN.COMPILE does; the rest has sizes that follow from what is found."""
        compile_regions(self.model.backbone, "default")  # type: ignore[arg-type]
        self.name += ", compiled"

    def inputs(self, batch: int) -> tuple[Tensor, list[Frame], list[Target]]:
        """Noise, with boxes of all sizes that are full of mask."""
        height, width = padded_size(self.size)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, height, width, generator=generator).to(self.device)
        targets = []
        for _ in range(batch):
            sides = 16 * 2 ** (4 * torch.rand(OBJECTS, 2, generator=generator)).clamp(max=min(self.size) / 20)
            corners = torch.rand(OBJECTS, 2, generator=generator) * (torch.tensor(self.size[::-1]) - sides).clamp(min=0)
            boxes = torch.cat((corners, corners + sides), dim=1)
            masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
            labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
            targets.append(Target(boxes, labels, masks).to(self.device))
        frame = Frame(self.size, (height, width), self.size)
        return images.contiguous(memory_format=torch.channels_last), [frame] * batch, targets

    def train(self, batch: int) -> Row:
        """Forward, backward and AdamW."""
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        images, frames, targets = self.inputs(batch)
        theirs = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks} for t in targets]
        cropped = [image[:, : self.size[0], : self.size[1]] for image in images]

        def step() -> None:
            with self.precision.autocast():
                losses = self.model(cropped, theirs) if self.is_torchvision else self.model(images, frames, targets)
                total = torch.stack(list(losses.values())).sum()
            total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def backbone_step() -> None:
            with self.precision.autocast():
                maps = self.backbone(images)
                total = torch.stack([x.float().mean() for x in maps]).sum()
            total.backward()

        return self.measured("train", batch, step, backbone_step, "")

    @torch.no_grad()
    def detect(self, batch: int) -> Row:
        """Images to boxes, classes and masks of the image's size."""
        self.model.eval()
        images, frames, _ = self.inputs(batch)
        cropped = [image[:, : self.size[0], : self.size[1]] for image in images]
        found: list[int] = []

        def step() -> None:
            with self.precision.autocast(), torch.no_grad():
                if self.is_torchvision:
                    boxes = [output["boxes"] for output in self.model(cropped)]
                else:
                    outputs = self.model.detect(images, frames)  # type: ignore[operator]
                    boxes = [output.boxes for output in outputs]
                    for output in outputs:
                        paste_masks(output.mask_probabilities, output.boxes, *self.size)
            found.append(sum(map(len, boxes)) // batch)

        def backbone_step() -> None:
            with self.precision.autocast(), torch.no_grad():
                self.backbone(images)

        # Fresh classifiers find nothing: sharpen them until there is as much to do as for a trained detector.
        for _ in range(MAX_SHARPENINGS):
            step()
            if found[-1] >= ENOUGH_DETECTIONS:
                break
            self.classifier_weight.mul_(2)
        row = self.measured("inference", batch, step, backbone_step, "")
        return row._replace(note=f"{found[-1]} detections an image" if found else "")

    @property
    def classifier_weight(self) -> Tensor:
        model: Any = self.model
        layer = model.roi_heads.box_predictor.cls_score if self.is_torchvision else model.roi_head.bbox_head.fc_cls
        return layer.weight.data

    def backbone(self, images: Tensor) -> list[Tensor]:
        """The four maps; torchvision's backbone without its pyramid."""
        if self.is_torchvision:
            return list(self.model.backbone.body(images).values())  # type: ignore[union-attr, operator]
        return self.model.backbone(images)  # type: ignore[operator]

    def measured(
        self, mode: str, batch: int, step: Callable[[], None], backbone_step: Callable[[], None], note: str
    ) -> Row:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            seconds = self.median_seconds(step)
            memory = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else 0.0
            share = 100 * self.median_seconds(backbone_step) / seconds
        except torch.OutOfMemoryError:
            return Row(self.name, mode, batch, 0.0, None, 0.0, note)
        finally:
            self.model.zero_grad(set_to_none=True)
        return Row(self.name, mode, batch, batch / seconds, share, memory, note)

    def median_seconds(self, step: Callable[[], None]) -> float:
        times: list[float] = []
        deadline = time.perf_counter() + 3 * self.seconds  # warming up may take long
        for number in range(1_000_000):
            synchronize(self.device)
            start = time.perf_counter()
            step()
            synchronize(self.device)
            if number >= WARMUP:
                times.append(time.perf_counter() - start)
            if times and (sum(times) >= self.seconds or time.perf_counter() > deadline):
                break
        return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())

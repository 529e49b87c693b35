"""Export a model: python -m utils.export OUT --weights FILE --to FORMAT

FORMAT is onnx, torchscript, exported_program or safetensors; OUT ends in .onnx, .pt, .pt2 or .safetensors.

--size is 224, 224x288 or dynamic; the batch size is dynamic. The file is read back and compared with PyTorch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from yacs.config import CfgNode

from data import build_data
from data.prefetch import DeviceLoader
from downstream.trained_model import (
    TrainedModel,
    add_data_flag,
    add_weights_flags,
    build_trained_backbone,
    data_flags,
    read_trained_model,
)
from models import MLLA, build_model, input_channels
from models.kernels.dispatch import KernelsUnavailableError
from utils.checkpoint.weights import load_weights, num_outputs
from utils.config.command_line import Parser, report_user_errors
from utils.config.errors import UserError
from utils.distributed.process import Process
from utils.tools.export_formats import (
    STRIDE,
    SUFFIXES,
    ExportError,
    Runner,
    latency_table,
    max_relative_error,
    open_runner,
    read_size,
    write,
)
from utils.tools.onnx_export import check_packages, write_reduced
from utils.tools.user_files import check_output, write_result
from utils.training.amp import Precision
from utils.training.build import build_precision
from utils.training.metrics import evaluate

PARTS = ("classifier", "features", "maps", "backbone")
PRECISIONS = ("float32", "float16", "int8")
TOLERANCE = 1e-4  # relative to the largest output


class Maps(nn.Module):
    """Feature maps of a classifier's stages: images (B, 3, H, W) to one (B, C, H, W) per stage."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.wrapped = model
        self.indices = model.prune_intermediate_layers(len(model.layers), prune_norm=True)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.wrapped.forward_intermediates(images, self.indices, intermediates_only=True))


class Backbone(nn.Module):
    """Backbone of a detector or segmentor that returns a tuple, as TorchScript requires."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.wrapped = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.wrapped(images))


def build_part(trained: TrainedModel, source: str, part: str) -> nn.Module:
    """Build the model, or a part of it, in evaluation mode on the CPU.

    Raises:
        ExportError: the model or the file has no such part.
        CheckpointError: the weights do not fit.
    """
    config, weights = trained.config, trained.weights
    model: Any
    if part == "backbone":
        model = Backbone(build_trained_backbone(trained, source))
    elif trained.task != "classification":
        raise ExportError(f"--part {part}: {source} is for {trained.task}; its --part backbone can be exported")
    else:
        model = build_model(config, num_outputs(weights, trained.classes))
        load_weights(model, weights, source)
    if part == "maps":
        if not isinstance(model, MLLA):
            raise ExportError(f"--part maps works with MODEL.TYPE mlla, not {config.MODEL.TYPE}")
        model = Maps(model)
    elif part == "features":
        model.reset_classifier(0)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def output_names(part: str, model: nn.Module, channels: int) -> list[str]:
    if part in ("maps", "backbone"):
        return [f"stage{i}" for i in range(len(model(torch.randn(1, channels, STRIDE, STRIDE))))]
    return ["logits" if part == "classifier" else "features"]


class AsModule(nn.Module):
    """Adapter from a runner to a module."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, images: Tensor) -> Tensor:
        return self.runner(images)[0]


def accuracy_table(config: CfgNode, loader: DeviceLoader, model: nn.Module, runner: Runner, file_format: str) -> str:
    """Format the accuracies of PyTorch and of the exported file on validation images."""
    process = Process(0, 1, torch.device("cpu"))
    precision: Precision = build_precision(config, process.device)
    rows = {"PyTorch": model, file_format: AsModule(runner)}
    scores = evaluate({name: candidate.eval() for name, candidate in rows.items()}, loader, process, precision)
    return "\n".join(
        f"{name:18} Acc@1 {score.acc1:.3f} Acc@5 {score.acc5:.3f} on {score.num_images} images"
        for name, score in scores.items()
    )


def check_args(args: Any) -> None:
    """Raise ExportError or UserFileError if the command line contradicts itself or the file cannot be written."""
    file_format = args.file_format
    read_size(args.size or "224")
    check_output(args.target, suffixes=[SUFFIXES[file_format]], force=args.force)
    if args.precision != "float32" and file_format != "onnx":
        raise ExportError(f"--precision {args.precision} works with --to onnx, not {file_format}")
    if args.size == "dynamic" and file_format == "torchscript":
        raise ExportError("--size dynamic works with onnx and exported_program; a TorchScript trace has a fixed size")
    if args.evaluate and (args.part not in (None, "classifier") or args.size == "dynamic"):
        raise ExportError("--evaluate works with --part classifier and the size of the configuration's images")
    if file_format == "onnx":
        check_packages()


def export(args: Any) -> None:
    """Run the command.

    Raises:
        ExportError: --size is wrong, or not DATA.IMG_SIZE with --evaluate; or the file does not compute the same.
    """
    trained = read_trained_model(args, flags={"AMP": False, **data_flags(args)})
    config = trained.config
    part = args.part or ("classifier" if trained.task == "classification" else "backbone")
    if args.evaluate and part != "classifier":
        raise ExportError(f"--evaluate works with classifiers, and {args.weights} is for {trained.task}; leave it out")
    size = read_size(args.size or str(config.DATA.get("IMG_SIZE", 224)))
    if args.evaluate and (size.height, size.width) != (config.DATA.IMG_SIZE, config.DATA.IMG_SIZE):
        raise ExportError(
            f"--size {args.size}: --evaluate scores images of DATA.IMG_SIZE {config.DATA.IMG_SIZE}; leave out --size"
        )
    loader = build_data(config, rank=0, num_processes=1).val if args.evaluate else None  # fails before the work
    model = build_part(trained, args.weights, part)
    channels = input_channels(config)
    metadata = {"classes": trained.classes, "config": config.dump()}
    metadata |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    report = ""

    def write_verified(path: Path) -> None:
        nonlocal report
        names = output_names(part, model, channels)
        report = write(args.file_format, model, path, size=size, channels=channels, names=names, metadata=metadata)
        error = max_relative_error(model, open_runner(args.file_format, path, model), size.examples(channels))
        if not error <= TOLERANCE:
            raise ExportError(
                f"{args.target}: differs from PyTorch by {error:.1e} of the largest output, above {TOLERANCE}"
            )
        if args.precision != "float32":
            exact = path.rename(path.with_suffix(".float32"))
            try:
                write_reduced(exact, path, args.precision)
            finally:
                exact.unlink()
            error = max_relative_error(model, open_runner(args.file_format, path, model), size.examples(channels))
        report += f", relative error {error:.1e}"

    write_result(args.target, write_verified)
    mib = args.target.stat().st_size / 2**20
    print(f"{args.target}: {part} in {args.file_format}, {args.precision}, {mib:.1f} MiB{report}")
    runner = open_runner(args.file_format, args.target, model)
    if loader is not None:
        print(accuracy_table(config, loader, model, runner, args.file_format))
    if args.benchmark:
        print(latency_table(model, runner, args.file_format, torch.randn(1, channels, *size.timed)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write")
    add_weights_flags(parser)
    parser.add_argument("--to", required=True, choices=sorted(SUFFIXES), dest="file_format")
    parser.add_argument("--size", help="a side (default DATA.IMG_SIZE), HxW, or dynamic: multiples of 32 from 64 on")
    parser.add_argument("--part", choices=PARTS, help="by default the classifier, or of dense tasks the backbone")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of an ONNX file")
    add_data_flag(parser)
    parser.add_argument("--evaluate", action="store_true", help="measure accuracy on the validation images")
    parser.add_argument("--benchmark", action="store_true", help="measure latency on this CPU against PyTorch")
    args = parser.parse_args(argv)
    with report_user_errors((UserError, KernelsUnavailableError)):
        check_args(args)
        export(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

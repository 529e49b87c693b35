"""Export a model: python -m utils.export OUT --cfg FILE --resume WEIGHTS --to FORM

FORM is onnx, torchscript, exported_program or safetensors; OUT ends in .onnx, .pt, .pt2 or .safetensors.

--size 224, 224x288 or dynamic; any number of images at once. What was written is read again and compared with PyTorch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from yacs.config import CfgNode

from config import SCHEMA, load_config
from data import build_data
from downstream.build import build_backbone
from downstream.detection import config as detection
from downstream.segmentation import config as segmentation
from models import MLLA, build_model, input_channels
from utils.checkpoint.weights import load_weights, read_state_dict, read_weights
from utils.config.command_line import Parser, report_user_errors
from utils.config.schema import read_file
from utils.distributed.process import Process
from utils.logs.atomic_write import write_atomic
from utils.tools.export_formats import (
    STRIDE,
    SUFFIXES,
    ExportError,
    Runner,
    largest_error,
    open_runner,
    read_size,
    time_table,
    write,
)
from utils.tools.onnx_export import check_packages, write_smaller
from utils.training.amp import Precision
from utils.training.build import build_precision
from utils.training.train_step import evaluate

PARTS = ("classifier", "features", "maps", "backbone")
PRECISIONS = ("float32", "float16", "int8")
TOLERANCE = 1e-4  # of the largest value
# Of each task: what reads its configuration.
TASKS = (
    (SCHEMA, load_config),
    (detection.SCHEMA, detection.load_config),
    (segmentation.SCHEMA, segmentation.load_config),
)


class Maps(nn.Module):
    """The stages' maps of a classifier: images (B, 3, H, W) to four of (B, C, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.wrapped = model
        self.indices = model.prune_intermediate_layers(len(model.layers), prune_norm=True)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.wrapped.forward_intermediates(images, self.indices, intermediates_only=True))


class Backbone(nn.Module):
    """A dense predictor's backbone with its outputs as a tuple, which TorchScript asks for."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.wrapped = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.wrapped(images))


def read_config(path: str, opts: Sequence[str], part: str) -> CfgNode:
    """A classifier's configuration; for a backbone also a detector's or segmentor's, the first that has all its keys.

    Raises:
        ConfigError: no task has them, or a value is wrong.
    """
    load = load_config
    if part == "backbone":
        names = {name for name, _, _ in read_file(SCHEMA, Path(path))} | set(opts[::2])
        load = next((load for schema, load in TASKS if names <= set(schema)), load_config)
    return load(path, opts, {"EVAL_MODE": True, "AMP": False})


def make_part(config: CfgNode, source: str, part: str, *, average: bool) -> nn.Module:
    """The model, or a part of it, with a file's weights, in evaluation mode on the CPU.

    Raises:
        ExportError: a part that the model or the file does not have.
        CheckpointError, DownloadError: the file cannot be read, or its weights do not fit.
    """
    weights = read_state_dict(source, average=average)
    model: Any
    if part == "backbone":
        model = Backbone(make_backbone(config, weights, source))
    else:
        model = build_model(config, len(weights["head.weight"]) if "head.weight" in weights else None)
        load_weights(model, weights, source)
    if part == "maps":
        if not isinstance(model, MLLA):
            raise ExportError(f"--part maps works with MODEL.TYPE mlla, not {config.MODEL.TYPE}")
        model = Maps(model)
    elif part == "features":
        model.reset_classifier(0)
    return model.eval().requires_grad_(False)


def make_backbone(config: CfgNode, weights: dict[str, Tensor], source: str) -> nn.Module:
    """The backbone of a detector or segmentor, from the whole one's weights or its own.

    Raises:
        ExportError: the weights are a classifier's, or the configuration another model's.
    """
    if config.MODEL.TYPE == "linear_vit":
        raise ExportError("--part backbone works with MODEL.TYPE mlla or timm:NAME, not linear_vit")
    weights = {n.removeprefix("backbone."): v for n, v in weights.items() if n.startswith("backbone.")} or weights
    if "norm0.weight" not in weights:
        raise ExportError(f"{source}: has no backbone with norms of its maps; for a classifier's use --part maps")
    backbone = build_backbone(config)
    load_weights(backbone, weights, source)
    return backbone


@torch.no_grad()
def output_names(part: str, model: nn.Module, channels: int) -> list[str]:
    if part in ("maps", "backbone"):
        return [f"stage{i}" for i in range(len(model(torch.randn(1, channels, STRIDE, STRIDE))))]
    return ["logits" if part == "classifier" else "features"]


class AsModule(nn.Module):
    """A runner where a model is expected."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, images: Tensor) -> Tensor:
        return self.runner(images)[0]


def accuracy_table(config: CfgNode, model: nn.Module, runner: Runner, form: str) -> str:
    """Scores on the configuration's validation images: PyTorch's, and of what was written."""
    process = Process(0, 1, torch.device("cpu"))
    precision: Precision = build_precision(config, process.device)
    loader = build_data(config, rank=0, num_processes=1).val
    rows = {"PyTorch": model, form: AsModule(runner)}
    scores = {name: evaluate(candidate, loader, process, precision) for name, candidate in rows.items()}
    return "\n".join(
        f"{name:18} Acc@1 {score.acc1:.3f} Acc@5 {score.acc5:.3f} on {score.num_images} images"
        for name, score in scores.items()
    )


def check_request(words: Any) -> None:
    """Raise ExportError before anything is read, if the command line contradicts itself."""
    target, form = words.target, words.form
    if target.exists() and not words.force:
        raise ExportError(f"{target}: is there already; name another file, or replace it with --force")
    if target.suffix != SUFFIXES[form]:
        raise ExportError(f"{target}: the name of a file for --to {form} ends in {SUFFIXES[form]}")
    if not target.parent.is_dir():
        raise ExportError(f"{target}: there is no folder {target.parent}")
    if words.precision != "float32" and form != "onnx":
        raise ExportError(f"--precision {words.precision} works with --to onnx, not {form}")
    if words.size == "dynamic" and form == "torchscript":
        raise ExportError("--size dynamic works with onnx and exported_program; a TorchScript trace has one size")
    if words.evaluate and (words.part != "classifier" or words.size == "dynamic"):
        raise ExportError("--evaluate works with --part classifier and the size of the configuration's images")
    if form == "onnx":
        check_packages()


def export(words: Any) -> None:
    """Do what the command line says.

    Raises:
        ExportError: --size is wrong, or not that of --evaluate's images; or the file computes something else.
    """
    config = read_config(words.cfg, words.opts, words.part)
    size = read_size(words.size or str(config.DATA.get("IMG_SIZE", 224)))
    if words.evaluate and (size.height, size.width) != (config.DATA.IMG_SIZE, config.DATA.IMG_SIZE):
        raise ExportError(
            f"--size {words.size}: --evaluate scores images of DATA.IMG_SIZE {config.DATA.IMG_SIZE}; leave out --size"
        )
    model = make_part(config, words.resume, words.part, average=words.ema)
    channels = 3 if config.MODEL.TYPE.startswith("timm:") else input_channels(config)
    classes = read_weights(words.resume, tolerant=True).classes
    facts = {"classes": classes, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    report = ""

    def write_verified(path: Path) -> None:
        nonlocal report
        names = output_names(words.part, model, channels)
        report = write(words.form, model, path, size=size, channels=channels, names=names, facts=facts)
        error = largest_error(model, open_runner(words.form, path, model), size.examples(channels))
        if not error <= TOLERANCE:
            raise ExportError(f"{words.target}: is off by {error:.1e} of the largest value, allowed is {TOLERANCE}")
        if words.precision != "float32":
            exact = path.rename(path.with_suffix(".float32"))
            try:
                write_smaller(exact, path, words.precision)
            finally:
                exact.unlink()
            error = largest_error(model, open_runner(words.form, path, model), size.examples(channels))
        report += f", off by {error:.1e} of the largest value"

    write_atomic(words.target, write_verified)
    mib = words.target.stat().st_size / 2**20
    print(f"{words.target}: {words.part} in {words.form}, {words.precision}, {mib:.1f} MiB{report}")
    runner = open_runner(words.form, words.target, model)
    if words.evaluate:
        print(accuracy_table(config, model, runner, words.form))
    if words.benchmark:
        print(time_table(model, runner, words.form, torch.randn(1, channels, *size.timed)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, prog="python -m utils.export")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file, such as cfgs/mlla_t.yaml")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="settings over the file's"
    )
    parser.add_argument(
        "--resume", "--weights", required=True, metavar="WEIGHTS", help="a path, a URL, or mlla-t, mlla-s, mlla-b"
    )
    parser.add_argument("--to", required=True, choices=sorted(SUFFIXES), dest="form")
    parser.add_argument("--size", help="a side (default DATA.IMG_SIZE), HxW, or dynamic: multiples of 32, at least 64")
    parser.add_argument("--part", default="classifier", choices=PARTS, help="logits, one vector, or maps; README.md")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of an ONNX file")
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="the model's weights, not the average's")
    parser.add_argument("--evaluate", action="store_true", help="score it on the configuration's validation images")
    parser.add_argument("--benchmark", action="store_true", help="time it on this CPU against PyTorch")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    words = parser.parse_args(argv)
    with report_user_errors():
        check_request(words)
        export(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())

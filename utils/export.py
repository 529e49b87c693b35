"""Export a model: python -m utils.export OUT --cfg FILE --resume WEIGHTS --to FORM

FORM is onnx, torchscript, exported_program or safetensors; OUT ends in .onnx, .pt, .pt2 or .safetensors.

--size 224, 224x288 or dynamic; any number of images at once. What was written is read again and compared with PyTorch.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.export import Dim
from yacs.config import CfgNode

from config import load_config
from data import build_data
from models import MLLA, build_model, input_channels
from utils.amp import Precision
from utils.build import build_precision
from utils.command_line import Parser
from utils.distributed import Process
from utils.engine import evaluate
from utils.onnx_file import check_packages, onnx_runner, write_onnx, write_smaller
from utils.weights import load_weights, read_state_dict, read_weights
from utils.weights_file import load_checkpoint
from utils.whole_file import write_whole

Runner = Callable[[Tensor], list[Tensor]]

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "exported_program": ".pt2", "safetensors": ".safetensors"}
PARTS = ("classifier", "features", "maps")
PRECISIONS = ("float32", "float16", "int8")
STRIDE = 32  # sides of dynamic sizes are multiples of it
TOLERANCE = 1e-4  # of the largest value
ROUNDS = 7


class ExportError(ValueError):
    """An export that cannot be made, or does not compute what the model does: one line with cause and remedy."""


class Maps(nn.Module):
    """The stages' maps of a classifier: images (B, 3, H, W) to four of (B, C, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.indices = model.prune_intermediate_layers(len(model.layers), prune_norm=True)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.forward_intermediates(images, self.indices, intermediates_only=True))


class Size(NamedTuple):
    """Images' height and width; `is_dynamic`: they are an example of multiples of 32."""

    height: int
    width: int
    is_dynamic: bool = False

    def examples(self, channels: int) -> list[tuple[int, int, int, int]]:
        """Shapes of images to compare on."""
        if not self.is_dynamic:
            return [(count, channels, self.height, self.width) for count in (1, 3)]
        return [(1, channels, 64, 64), (2, channels, 96, 160), (1, channels, 224, 192)]


def read_size(text: str) -> Size:
    """What --size says.

    Raises:
        ExportError: neither a side, nor HxW, nor dynamic.
    """
    if text == "dynamic":
        return Size(96, 128, is_dynamic=True)
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 8 for side in sides):
        raise ExportError(f"--size {text}: write a side in pixels, at least 8, such as 224; or 224x288; or dynamic")
    return Size(int(sides[0]), int(sides[-1]))


def make_part(config: CfgNode, source: str, part: str, *, average: bool) -> nn.Module:
    """The model, or a part of it, with a file's weights, in evaluation mode on the CPU.

    Raises:
        ExportError: maps of a model that gives none.
        CheckpointError, DownloadError: the file cannot be read, or its weights do not fit.
    """
    weights = read_state_dict(source, average=average)
    model: Any = build_model(config, len(weights["head.weight"]) if "head.weight" in weights else None)
    load_weights(model, weights, source)
    if part == "maps" and not isinstance(model, MLLA):
        raise ExportError(f"--part maps works with MODEL.TYPE mlla, not {config.MODEL.TYPE}")
    if part == "features":
        model.reset_classifier(0)
    model = Maps(model) if part == "maps" else model
    return model.eval().requires_grad_(False)


def output_names(part: str, model: nn.Module) -> list[str]:
    if part == "maps":
        return [f"stage{i}" for i in range(len(model.model.layers))]  # type: ignore[arg-type, union-attr]
    return ["logits" if part == "classifier" else "features"]


def program_of(model: nn.Module, images: Tensor, size: Size) -> torch.export.ExportedProgram:
    """torch.export's graph for any number of images, and for sizes that are multiples of 32 if they are dynamic."""
    shapes: dict[int, Any] = {0: Dim("batch")}
    if size.is_dynamic:
        shapes |= {2: STRIDE * Dim("rows", min=2), 3: STRIDE * Dim("columns", min=2)}
    return torch.export.export(model, (images,), dynamic_shapes=(shapes,), strict=False)


def write(form: str, model: nn.Module, target: Path, *, size: Size, channels: int, names: list[str], facts: Any) -> str:
    """Write one form in float32; gives what there is to say of it."""
    images = torch.randn(2, channels, size.height, size.width)
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, target)
        return ""
    if form == "torchscript":
        torch.jit.trace(model, images, check_trace=False).save(str(target))
        return ""
    program = program_of(model, images, size)
    if form == "exported_program":
        torch.export.save(program, target)
        return ""
    return f", opset {write_onnx(program, target, outputs=names, facts=facts)}"


def open_runner(form: str, path: Path, model: nn.Module) -> Runner:
    """What was written, as a function from images to a list of outputs."""
    if form == "onnx":
        return onnx_runner(path)
    if form == "torchscript":
        loaded = torch.jit.load(path)
    elif form == "exported_program":
        loaded = torch.export.load(path).module()
    else:
        loaded = model
        model.load_state_dict(load_checkpoint(path)["model"])
    return lambda images: as_list(loaded(images))


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@torch.no_grad()
def largest_error(model: nn.Module, runner: Runner, shapes: Sequence[tuple[int, ...]]) -> float:
    """Largest difference from PyTorch on random images, over the largest value of the output (1 at least)."""
    worst = 0.0
    for shape in shapes:
        images = torch.randn(shape)
        for expected, found in zip(as_list(model(images)), runner(images), strict=True):
            worst = max(worst, ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item())
    return worst


@torch.no_grad()
def milliseconds(runner: Callable[[Tensor], Any], images: Tensor) -> float:
    """Median time of a call, after a first one."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        runner(images)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def time_table(model: nn.Module, runner: Runner, form: str, images: Tensor) -> str:
    """Time of one image on this CPU: PyTorch, compiled, and what was written."""
    rows: dict[str, Callable[[Tensor], Any]] = {"PyTorch": model, "torch.compile": torch.compile(model), form: runner}
    lines = [f"{name:18} {milliseconds(run, images):8.1f} ms" for name, run in rows.items()]
    shape = "x".join(map(str, images.shape[2:]))
    return "\n".join([f"one image of {shape}, {torch.get_num_threads()} thread(s), median of {ROUNDS}:", *lines])


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
        ExportError: what was written computes something else than the model.
    """
    size = read_size(words.size)
    config = load_config(words.cfg, words.opts, {"EVAL_MODE": True, "AMP": False})
    model = make_part(config, words.resume, words.part, average=words.ema)
    channels = input_channels(config)
    facts = {"classes": read_weights(words.resume).classes, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    report = ""

    def write_checked(path: Path) -> None:
        nonlocal report
        names = output_names(words.part, model)
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

    write_whole(words.target, write_checked)
    mib = words.target.stat().st_size / 2**20
    print(f"{words.target}: {words.part} in {words.form}, {words.precision}, {mib:.1f} MiB{report}")
    runner = open_runner(words.form, words.target, model)
    if words.evaluate:
        print(accuracy_table(config, model, runner, words.form))
    if words.benchmark:
        print(time_table(model, runner, words.form, torch.randn(1, channels, size.height, size.width)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m utils.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file, such as cfgs/mlla_t.yaml")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="settings over the file's")
    parser.add_argument("--resume", required=True, metavar="WEIGHTS", help="a path, a URL, or mlla-t, mlla-s, mlla-b")
    parser.add_argument("--to", required=True, choices=sorted(SUFFIXES), dest="form")
    parser.add_argument("--size", default="224", help="side in pixels, HxW, or dynamic: multiples of 32 from 64 on")
    parser.add_argument("--part", default="classifier", choices=PARTS, help="logits, one vector, or the stages' maps")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of an ONNX file")
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="the model's weights, not the average's")
    parser.add_argument("--evaluate", action="store_true", help="score it on the configuration's validation images")
    parser.add_argument("--benchmark", action="store_true", help="time it on this CPU against PyTorch")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    words = parser.parse_args(argv)
    try:
        check_request(words)
        export(words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Files of exported models: written from PyTorch modules, opened again as functions, compared and timed."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

from utils.checkpoint.weights_file import load_checkpoint
from utils.tools.onnx_export import onnx_runner, write_onnx

Runner = Callable[[Tensor], list[Tensor]]

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "exported_program": ".pt2", "safetensors": ".safetensors"}
STRIDE = 32  # sides of dynamic sizes are multiples of it
MOST_IMAGES = 2**31 - 1  # at once; without a bound torch before 2.8 refuses timm's models
ROUNDS = 15
TIMED_SIDE = 224  # pixels, of files for any size


class ExportError(ValueError):
    """An export that cannot be made, or does not compute what the model does: one line with cause and remedy."""


class Size(NamedTuple):
    """Images' height and width; `is_dynamic`: they are an example of multiples of 32."""

    height: int
    width: int
    is_dynamic: bool = False

    def examples(self, channels: int) -> list[tuple[int, int, int, int]]:
        """Shapes of images to compare on."""
        if not self.is_dynamic:
            return [(count, channels, self.height, self.width) for count in (1, 3)]
        return [(1, channels, 64, 64), (2, channels, 96, 160), (1, channels, 224, 224), (1, channels, 256, 192)]

    @property
    def timed(self) -> tuple[int, int]:
        """Height and width of the image to time."""
        return (TIMED_SIDE, TIMED_SIDE) if self.is_dynamic else (self.height, self.width)


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


def program_of(model: nn.Module, images: Tensor, size: Size) -> torch.export.ExportedProgram:
    """torch.export's graph for any number of images, and for sizes that are multiples of 32 if they are dynamic."""
    shapes: dict[int, Any] = {0: Dim("batch", max=MOST_IMAGES)}
    if size.is_dynamic:
        shapes |= {2: STRIDE * Dim("rows", min=2), 3: STRIDE * Dim("columns", min=2)}
    return torch.export.export(model, (images,), dynamic_shapes=(shapes,), strict=False)


def write(form: str, model: nn.Module, target: Path, *, size: Size, channels: int, names: list[str], facts: Any) -> str:
    """Write one form in float32; gives what there is to say of it."""
    images = torch.randn(2, channels, size.height, size.width)
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in named(model).state_dict().items()}, target)
        return ""
    if form == "torchscript":
        torch.jit.trace(model, images, check_trace=False).save(str(target))
        return ""
    program = program_of(model, images, size)
    if form == "exported_program":
        with target.open("wb") as file:  # since a path would have to end in .pt2
            torch.export.save(program, file)
        return ""
    return f", opset {write_onnx(program, target, outputs=names, facts=facts)}"


def open_runner(form: str, path: Path, model: nn.Module) -> Runner:
    """What was written, as a function from images to a list of outputs."""
    if form == "onnx":
        return onnx_runner(path)
    if form == "torchscript":
        loaded = torch.jit.load(path)
    elif form == "exported_program":
        with path.open("rb") as file:
            loaded = torch.export.load(file).module()
    else:
        loaded = model
        named(model).load_state_dict(load_checkpoint(path)["model"])
    return lambda images: as_list(loaded(images))


def named(model: nn.Module) -> nn.Module:
    """The module by whose names weights are kept: the model, or what it wraps."""
    return getattr(model, "wrapped", model)


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
def milliseconds(runners: Mapping[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, float]:
    """Median time of a call of each, after a first one; by turns, so that a busy machine slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            run(images)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def time_table(model: nn.Module, runner: Runner, form: str, images: Tensor) -> str:
    """Time of one image on this CPU: PyTorch, compiled, and what was written."""
    medians = milliseconds({"PyTorch": model, "torch.compile": torch.compile(model), form: runner}, images)
    shape = "x".join(map(str, images.shape[2:]))
    return "\n".join(
        [
            f"one image of {shape}, {torch.get_num_threads()} thread(s), median of {ROUNDS} by turns:",
            *(f"{name:18} {value:8.1f} ms" for name, value in medians.items()),
        ]
    )

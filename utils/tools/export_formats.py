"""Write PyTorch modules in export formats, open the files as functions, compare and time them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from utils.checkpoint.weights_file import load_checkpoint, write_safetensors
from utils.config.errors import UserError
from utils.tools.onnx_export import onnx_runner, write_onnx

Runner = Callable[[Tensor], list[Tensor]]

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "exported_program": ".pt2", "safetensors": ".safetensors"}
STRIDE = 32  # dynamic sides are multiples of it
MAX_BATCH_SIZE = 2**31 - 1  # without a bound, torch before 2.8 refuses timm's models
ROUNDS = 15
TIMED_SIDE = 224  # pixels, of files with dynamic sizes


class ExportError(UserError):
    """An export that is not possible, or that does not compute what the model does."""


class Size(NamedTuple):
    """Height and width of the images in pixels; an example if `is_dynamic`, when any multiples of 32 are allowed."""

    height: int
    width: int
    is_dynamic: bool = False

    def examples(self, channels: int) -> list[tuple[int, int, int, int]]:
        """Return the image shapes on which file and model are compared."""
        if not self.is_dynamic:
            return [(count, channels, self.height, self.width) for count in (1, 3)]
        return [(1, channels, 64, 64), (2, channels, 96, 160), (1, channels, 224, 224), (1, channels, 256, 192)]

    @property
    def timed(self) -> tuple[int, int]:
        """Height and width of the image that is timed."""
        return (TIMED_SIDE, TIMED_SIDE) if self.is_dynamic else (self.height, self.width)


def read_size(text: str) -> Size:
    """Parse --size.

    Raises:
        ExportError: not a side, HxW, or dynamic.
    """
    if text == "dynamic":
        return Size(96, 128, is_dynamic=True)
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 8 for side in sides):
        raise ExportError(f"--size {text}: write a side in pixels, at least 8, such as 224; or 224x288; or dynamic")
    return Size(int(sides[0]), int(sides[-1]))


def export_program(model: nn.Module, images: Tensor, size: Size) -> torch.export.ExportedProgram:
    """Return the graph of torch.export with a dynamic batch size and, if the size is dynamic, dynamic sides."""
    shapes: dict[int, Any] = {0: Dim("batch", max=MAX_BATCH_SIZE)}
    if size.is_dynamic:
        shapes |= {2: STRIDE * Dim("rows", min=2), 3: STRIDE * Dim("columns", min=2)}
    return torch.export.export(model, (images,), dynamic_shapes=(shapes,), strict=False)


def write(
    file_format: str, model: nn.Module, target: Path, *, size: Size, channels: int, names: list[str], metadata: Any
) -> str:
    """Write a file in float32, ONNX and safetensors with metadata, and return what to report about it."""
    images = torch.randn(2, channels, size.height, size.width)
    if file_format == "safetensors":
        write_safetensors(target, unwrapped(model).state_dict(), metadata)
        return ""
    if file_format == "torchscript":
        torch.jit.trace(model, images, check_trace=False).save(str(target))
        return ""
    program = export_program(model, images, size)
    if file_format == "exported_program":
        with target.open("wb") as file:  # because a path would have to end in .pt2
            torch.export.save(program, file)
        return ""
    return f", opset {write_onnx(program, target, outputs=names, metadata=metadata)}"


def open_runner(file_format: str, path: Path, model: nn.Module) -> Runner:
    """Open an exported file as a function from images to a list of outputs."""
    if file_format == "onnx":
        return onnx_runner(path)
    if file_format == "torchscript":
        loaded = torch.jit.load(path)
    elif file_format == "exported_program":
        with path.open("rb") as file:
            loaded = torch.export.load(file).module()
    else:
        loaded = model
        unwrapped(model).load_state_dict(load_checkpoint(path)["model"])
    return lambda images: as_list(loaded(images))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module whose state_dict is saved: the model, or the module that it wraps."""
    return getattr(model, "wrapped", model)


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@torch.no_grad()
def max_relative_error(model: nn.Module, runner: Runner, shapes: Sequence[tuple[int, ...]]) -> float:
    """Return the largest difference from PyTorch on random images, relative to the largest output (at least 1)."""
    worst = 0.0
    for shape in shapes:
        images = torch.randn(shape)
        for expected, output in zip(as_list(model(images)), runner(images), strict=True):
            worst = max(worst, ((output - expected).abs().max() / expected.abs().max().clamp(min=1)).item())
    return worst


@torch.no_grad()
def milliseconds(runners: Mapping[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, float]:
    """Return the median milliseconds per call, without warm-up; in turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            run(images)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def latency_table(model: nn.Module, runner: Runner, file_format: str, images: Tensor) -> str:
    """Format the latency of one image on this CPU: PyTorch, torch.compile and the exported file."""
    medians = milliseconds({"PyTorch": model, "torch.compile": torch.compile(model), file_format: runner}, images)
    shape = "x".join(map(str, images.shape[2:]))
    return "\n".join(
        [
            f"one image of {shape}, torch threads {torch.get_num_threads()}, median of {ROUNDS} calls in turns:",
            *(f"{name:18} {value:8.1f} ms" for name, value in medians.items()),
        ]
    )

"""Speed of a model on synthetic images: warm-up left out, median of rounds."""

import platform
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.amp import Precision

WARMUP_BATCHES = 3


@dataclass(frozen=True)
class Throughput:
    """One row of the table; memory is the peak, of the GPU's allocator or of the whole process on a CPU."""

    model: str
    chip: str
    torch: str
    precision: str
    layout: str
    compile: str
    batch: int
    size: int
    images_per_second: float
    milliseconds_per_batch: float
    memory_mib: float
    rounds: int
    batches_per_round: int


def measure_throughput(
    model: nn.Module,
    *,
    name: str,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    image_size: int,
    in_chans: int = 3,
    compile_mode: str = "off",
    rounds: int = 5,
    round_seconds: float = 1.0,
) -> Throughput:
    """Time inference in rounds of about `round_seconds` seconds each; images are random and already on the device."""
    model = compiled(model.eval(), compile_mode)
    images = torch.randn(batch_size, in_chans, image_size, image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    run_batches(model, images, precision, WARMUP_BATCHES)
    seconds = run_batches(model, images, precision, 1)
    num_batches = max(1, round(round_seconds / seconds))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [run_batches(model, images, precision, num_batches) / num_batches for _ in range(rounds)]
    batch_seconds = statistics.median(times)
    return Throughput(
        model=name,
        chip=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        torch=str(torch.__version__),
        precision=precision.name,
        layout="channels_last",
        compile=compile_mode,
        batch=batch_size,
        size=image_size,
        images_per_second=batch_size / batch_seconds,
        milliseconds_per_batch=1000 * batch_seconds,
        memory_mib=peak_memory_mib(device),
        rounds=rounds,
        batches_per_round=num_batches,
    )


def measure_in_turns(
    models: Mapping[str, nn.Module],
    *,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    image_size: int,
    rounds: int = 5,
) -> dict[str, float]:
    """Images per second of several models, median of rounds in which each has its turn: all see the same machine."""
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            result = measure_throughput(
                model.to(device),
                name=name,
                device=device,
                precision=precision,
                batch_size=batch_size,
                image_size=image_size,
                rounds=1,
                round_seconds=0.5,
            )
            speeds[name].append(result.images_per_second)
    return {name: statistics.median(values) for name, values in speeds.items()}


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """The model through torch.compile in the given mode, or as it is for "off"."""
    return model if mode == "off" else torch.compile(model, mode=mode)  # type: ignore[return-value]


@torch.inference_mode()
def run_batches(model: nn.Module, images: Tensor, precision: Precision, count: int) -> float:
    """Seconds for `count` forward passes, all work on the device included."""
    synchronise(images.device)
    start = time.perf_counter()
    for _ in range(count):
        with precision.autocast():
            model(images)
    synchronise(images.device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far: allocated on the GPU, or resident in this process where there is none. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def throughput_table(result: Throughput) -> str:
    """A heading and the row, in columns."""
    columns = {
        "model": result.model,
        "chip": result.chip,
        "precision": result.precision,
        "compile": result.compile,
        "batch": str(result.batch),
        "size": str(result.size),
        "img/s": f"{result.images_per_second:.1f}",
        "ms/batch": f"{result.milliseconds_per_batch:.1f}",
        "peak MiB": f"{result.memory_mib:.0f}",
    }
    widths = [max(len(name), len(value)) for name, value in columns.items()]
    lines = [list(columns), list(columns.values())]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)

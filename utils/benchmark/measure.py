"""Speed on synthetic inputs that are on the device: the median of rounds, after a warm-up."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.distributed.process import min_over_processes
from utils.logs.logger import duration, logger
from utils.speed.memory import peak_memory_mib
from utils.training.amp import Precision
from utils.training.train_step import TrainStep

WARMUP_CALLS = 3
SLOW_SECONDS = 2.0  # of a call, from which on a line says how long the measurement takes
WARMUP_STEPS = 8  # enough for a training step to be captured as a CUDA graph


@dataclass(frozen=True)
class Throughput:
    """One row of the table; memory is the peak, of the GPU's allocator or of the whole process on a CPU.

    `alone` has the images per second of each process by itself, all at the same time, where several work together:
    GPUs of a machine differ, and the slowest one sets the pace. `scaling` is their common speed in per cent of the sum.
    """

    model: str
    work: str
    chip: str
    torch: str
    precision: str
    layout: str
    compile: str
    batch: int
    size: int | str  # the side of square images in pixels, or HEIGHTxWIDTH
    processes: int
    images_per_second: float
    milliseconds_per_batch: float
    memory_mib: float
    rounds: int
    batches_per_round: int
    scaling: float | None = None
    alone: tuple[float, ...] = ()


@dataclass(frozen=True)
class Conditions:
    """Settings that a measurement shares with those it is compared to.

    Attributes:
        compile: the resolved compile mode.
        num_processes: processes that work together, whose images add up.
        rounds: rounds of which the median counts.
        round_seconds: approximate length of a round.
    """

    device: torch.device
    precision: Precision
    compile: str = "off"
    num_processes: int = 1
    rounds: int = 5
    round_seconds: float = 1.0


def synthetic_images(batch_size: int, size: tuple[int, int], device: torch.device, *, in_chans: int = 3) -> Tensor:
    """Return random images (B, in_chans, H, W) in channels_last."""
    return torch.randn(batch_size, in_chans, *size, device=device).contiguous(memory_format=torch.channels_last)


def measure_inference(
    predict: Callable[[], object], conditions: Conditions, *, name: str, batch_size: int, size: tuple[int, int]
) -> Throughput:
    """Time `predict`, which computes a batch's predictions, without gradient and under autocast."""

    @torch.no_grad()
    def call() -> None:
        with conditions.precision.autocast():
            predict()

    return measure(call, conditions, WARMUP_CALLS, name, "inference", batch_size, size)


def measure_training(
    train_step: TrainStep,
    batch: Any,
    conditions: Conditions,
    *,
    name: str,
    batch_size: int,
    size: tuple[int, int],
    step: int = 0,
    work: str = "training",
) -> Throughput:
    """Time a run's own training step on one micro-batch; `step` is its number in the run.

    The learning rate is 0, so that the weights stay unchanged; the work is the same.
    """
    train_step.model.train()
    return measure(
        lambda: train_step([batch], step=step, learning_rate=0.0),
        conditions,
        WARMUP_STEPS,
        name,
        work,
        batch_size,
        size,
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
    """Return images per second of several classifiers, timed in turns so that all see the same machine."""

    def predict(model: nn.Module) -> Callable[[], None]:
        images = synthetic_images(batch_size, (image_size, image_size), device)

        @torch.no_grad()
        def call() -> None:
            with precision.autocast():
                model(images)

        return call

    calls = {name: predict(model.to(device).eval()) for name, model in models.items()}
    seconds = median_seconds(calls, device, rounds=rounds, round_seconds=0.5, warmup=WARMUP_CALLS)
    return {name: batch_size / value for name, (value, _) in seconds.items()}


def measure(
    call: Callable[[], object],
    conditions: Conditions,
    warmup: int,
    name: str,
    work: str,
    batch_size: int,
    size: tuple[int, int],
) -> Throughput:
    """Return the row for `call`, which processes one batch."""
    device = conditions.device
    size_name = size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"
    logger.info(
        "measuring %s of %s, batch %d, size %s, on %s: %d calls to warm up, then %d rounds of %.0f s, or of one call",
        *(work, name, batch_size, size_name, device, warmup, conditions.rounds, conditions.round_seconds),
    )
    reset_peak_memory(device)
    ((batch_seconds, num_batches),) = median_seconds(
        {name: call},
        device,
        rounds=conditions.rounds,
        round_seconds=conditions.round_seconds,
        warmup=warmup,
        num_processes=conditions.num_processes,
    ).values()
    return Throughput(
        model=name,
        work=work,
        chip=chip_name(device),
        torch=str(torch.__version__),
        precision=conditions.precision.name,
        layout="channels_last",
        compile=conditions.compile,
        batch=batch_size,
        size=size_name,
        processes=conditions.num_processes,
        images_per_second=conditions.num_processes * batch_size / batch_seconds,
        milliseconds_per_batch=1000 * batch_seconds,
        memory_mib=peak_memory_mib(device),
        rounds=conditions.rounds,
        batches_per_round=num_batches,
    )


def median_seconds(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    round_seconds: float,
    warmup: int,
    num_processes: int = 1,
) -> dict[str, tuple[float, int]]:
    """Time functions in turns, round by round, so that a disturbance of the machine affects all of them.

    Args:
        calls: the functions by name; their work on the device counts.
        device: where they work.
        rounds: rounds per function, of which the median counts.
        round_seconds: approximate length of a round.
        warmup: calls before the measurement.
        num_processes: processes that call together, and therefore equally often.

    Returns:
        By name, the median of the seconds per call, and the number of calls in a round.
    """
    counts = {}
    for name, call in calls.items():
        first = run_calls(call, device, 1)
        if first > SLOW_SECONDS:
            seconds_left = first * (warmup + rounds)
            logger.info("the first call took %s; the others take %s at most", duration(first), duration(seconds_left))
        run_calls(call, device, warmup - 1)
        count = torch.tensor(max(1, round(round_seconds / run_calls(call, device, 1))), device=device)
        counts[name] = int(min_over_processes(count) if num_processes > 1 else count)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(run_calls(call, device, counts[name]) / counts[name])
    return {name: (statistics.median(values), counts[name]) for name, values in seconds.items()}


def run_calls(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Return the seconds of `count` calls, including all work on the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Free cached memory, and let the next peak count from here."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def chip_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"

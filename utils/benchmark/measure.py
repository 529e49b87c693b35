"""Speed on synthetic images that lie on the device: warm-up left out, median of rounds."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from utils.distributed.process import min_over_processes
from utils.speed.memory import peak_memory_mib
from utils.training.amp import Precision
from utils.training.train_step import TrainStep

WARMUP_CALLS = 3
WARMUP_STEPS = 8  # a step that becomes a CUDA graph does so within them


@dataclass(frozen=True)
class Throughput:
    """One row of the table; memory is the peak, of the GPU's allocator or of the whole process on a CPU."""

    model: str
    work: str
    chip: str
    torch: str
    precision: str
    layout: str
    compile: str
    batch: int
    size: int
    processes: int
    images_per_second: float
    milliseconds_per_batch: float
    memory_mib: float
    rounds: int
    batches_per_round: int


@dataclass(frozen=True)
class Conditions:
    """What a measurement has in common with those it is compared to.

    Attributes:
        compile: the mode, resolved.
        num_processes: those that work together; the images of all count.
        round_seconds: about how long a round takes; the median of `rounds` counts.
    """

    device: torch.device
    precision: Precision
    compile: str = "off"
    in_chans: int = 3
    num_processes: int = 1
    rounds: int = 5
    round_seconds: float = 1.0


def measure_inference(
    model: nn.Module, conditions: Conditions, *, name: str, batch_size: int, image_size: int
) -> Throughput:
    """Time forward passes of a model in evaluation mode, already compiled as `conditions` say."""
    device = conditions.device
    images = torch.randn(batch_size, conditions.in_chans, image_size, image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward() -> None:
        with conditions.precision.autocast():
            model(images)

    return timed(forward, conditions, WARMUP_CALLS, name, "inference", batch_size, image_size)


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
    conditions = Conditions(device, precision, rounds=1, round_seconds=0.5)
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            model = model.to(device).eval()
            result = measure_inference(model, conditions, name=name, batch_size=batch_size, image_size=image_size)
            speeds[name].append(result.images_per_second)
    return {name: statistics.median(values) for name, values in speeds.items()}


def measure_training(
    train_step: TrainStep,
    conditions: Conditions,
    *,
    name: str,
    batch_size: int,
    image_size: int,
    num_classes: int,
    step: int = 0,
    work: str = "training",
) -> Throughput:
    """Time a run's own training step, at one batch a step; `step` is the step of the run that it takes itself for.

    The learning rate is 0, so that the weights stay where they are; the work is the same.
    """
    device = conditions.device
    images = torch.randn(batch_size, conditions.in_chans, image_size, image_size, device=device)
    batch = (
        images.contiguous(memory_format=torch.channels_last),
        torch.randn(batch_size, num_classes, device=device).softmax(dim=1),
    )
    train_step.model.train()

    def update() -> None:
        train_step([batch], step=step, learning_rate=0.0)

    return timed(update, conditions, WARMUP_STEPS, name, work, batch_size, image_size)


def timed(
    call: Callable[[], None], conditions: Conditions, warmup: int, name: str, work: str, batch_size: int, size: int
) -> Throughput:
    """The row for `call`, which works through one batch."""
    device = conditions.device
    reset_peak_memory(device)
    run_rounds(call, device, warmup)
    seconds = run_rounds(call, device, 1)
    wanted = torch.tensor(max(1, round(conditions.round_seconds / seconds)), device=device)
    if conditions.num_processes > 1:
        min_over_processes(wanted)  # they call each other within a batch, so they do as many
    num_batches = int(wanted)
    batch_seconds = statistics.median(
        run_rounds(call, device, num_batches) / num_batches for _ in range(conditions.rounds)
    )
    return Throughput(
        model=name,
        work=work,
        chip=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        torch=str(torch.__version__),
        precision=conditions.precision.name,
        layout="channels_last",
        compile=conditions.compile,
        batch=batch_size,
        size=size,
        processes=conditions.num_processes,
        images_per_second=conditions.num_processes * batch_size / batch_seconds,
        milliseconds_per_batch=1000 * batch_seconds,
        memory_mib=peak_memory_mib(device),
        rounds=conditions.rounds,
        batches_per_round=num_batches,
    )


def run_rounds(call: Callable[[], None], device: torch.device, count: int) -> float:
    """Seconds for `count` calls, all work on the device included."""
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
    """Let the next peak be that of what comes, without what nobody holds any longer."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

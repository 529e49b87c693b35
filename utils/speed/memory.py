"""Peak memory, and the message for a GPU that runs out of it."""

import platform
import re
import resource

import torch

USAGE = re.compile(r"total capacity of ([\d.]+ \w+)")


def out_of_memory_message(
    error: BaseException,
    *,
    work: str,
    batch_size: int,
    accumulation_steps: int | None,
    amp: bool,
    can_checkpoint: bool,
    smaller: str,
) -> str:
    """Return one line with what did not fit into the GPU's memory, and the remedies, the mildest first.

    Args:
        error: torch.OutOfMemoryError.
        work: what did not fit.
        batch_size: images per process and forward pass.
        accumulation_steps: gradient accumulation steps; None if nothing is trained.
        amp: mixed precision is on already.
        can_checkpoint: activation checkpointing (--use-checkpoint) is available and off.
        smaller: the last remedy, smaller images.
    """
    capacity = USAGE.search(str(error))
    remedies = [] if amp else ["add --amp"]
    half = max(1, batch_size // 2)
    if accumulation_steps is None:
        remedies += [f"lower --batch-size (for example to {half})"] if batch_size > 1 else []
    else:
        remedies += ["add --use-checkpoint (activation checkpointing)"] if can_checkpoint else []
        if batch_size > 1:
            opts = f"--opts TRAIN.ACCUMULATION_STEPS {accumulation_steps * 2}"
            remedies.append(f"lower --batch-size (for example to {half}; {opts} keeps the global batch size)")
    return (
        f"out of GPU memory{f' ({capacity[1]})' if capacity else ''} with {work}: {', or '.join([*remedies, smaller])}"
    )


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: allocated on the GPU, or, without a GPU, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)

"""How much memory is used, and what to say when a GPU's does not suffice."""

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
    can_recompute: bool,
    smaller: str,
) -> str:
    """One line with what was asked of the GPU, and what asks less of it, the mildest remedy first.

    Args:
        error: torch.OutOfMemoryError.
        work: what did not fit.
        batch_size: images per process and forward pass.
        accumulation_steps: forward passes per step; None where nothing is trained.
        amp: 16-bit autocast is on already.
        can_recompute: --use-checkpoint would help.
        smaller: the last remedy, which is smaller images.
    """
    capacity = USAGE.search(str(error))
    remedies = [] if amp else ["add --amp"]
    half = max(1, batch_size // 2)
    if accumulation_steps is None:
        remedies += [f"lower --batch-size (to {half}, say)"] if batch_size > 1 else []
    else:
        remedies += ["add --use-checkpoint, which recomputes the blocks"] if can_recompute else []
        if batch_size > 1:
            same_step = f"TRAIN.ACCUMULATION_STEPS {accumulation_steps * 2}"
            remedies.append(f"lower --batch-size (to {half}, say; with --opts {same_step} a step has as many images)")
    return (
        f"the GPU's memory{f' of {capacity[1]}' if capacity else ''} does not suffice for {work}: "
        f"{', or '.join([*remedies, smaller])}"
    )


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far: allocated on the GPU, or resident in this process where there is none. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)

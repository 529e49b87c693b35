"""Memory: what training will need, what there is, the peak, and messages where it does not suffice."""

import contextlib
import platform
import re
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    settings = {"accumulation_steps": accumulation_steps, "amp": amp, "can_checkpoint": can_checkpoint}
    remedies = memory_remedies(batch_size=batch_size, smaller=smaller, **settings)  # type: ignore[arg-type]
    return f"out of GPU memory{f' ({capacity[1]})' if capacity else ''} with {work}: {remedies}"


def memory_remedies(
    *, batch_size: int, accumulation_steps: int | None, amp: bool, can_checkpoint: bool, smaller: str
) -> str:
    """Return what makes less of memory necessary, with the arguments of `out_of_memory_message`."""
    remedies = [] if amp else ["add --amp"]
    half = max(1, batch_size // 2)
    if accumulation_steps is None:
        remedies += [f"lower --batch-size (for example to {half})"] if batch_size > 1 else []
    else:
        remedies += ["add --use-checkpoint (activation checkpointing)"] if can_checkpoint else []
        if batch_size > 1:
            opts = f"--opts TRAIN.ACCUMULATION_STEPS {accumulation_steps * 2}"
            remedies.append(f"lower --batch-size (for example to {half}; {opts} keeps the global batch size)")
    return ", or ".join([*remedies, smaller])


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: allocated on the GPU, or, without a GPU, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


class SavedBytes:
    """Context that counts the bytes that forward passes keep for the backward pass, each storage once; no parameters.

    On the device "meta" nothing is computed or allocated.

    Attributes:
        total: bytes so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self.kept: dict[int, Tensor] = {}  # by the storage's address, so that it is not used again
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            return tensor
        if storage._cdata not in self.kept:
            self.kept[storage._cdata] = tensor
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> "SavedBytes":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


def activation_bytes(forward: Callable[[], object], recomputed: Sequence[nn.Module] = ()) -> int:
    """Return the bytes that a forward pass keeps for its backward pass.

    Args:
        forward: runs the forward pass, without activation checkpointing.
        recomputed: modules of it that are to be checkpointed: of each only the output is kept, and of one at a time,
            the largest, all that it keeps otherwise.
    """
    starts: dict[nn.Module, int] = {}
    inner: list[int] = []
    outputs: list[int] = []

    def leave(module: nn.Module, _: object, output: Any) -> None:
        inner.append(saved.total - starts[module])
        outputs.append(output.untyped_storage().nbytes())

    with contextlib.ExitStack() as stack, SavedBytes() as saved:
        for module in recomputed:
            before = module.register_forward_pre_hook(lambda module, _: starts.update({module: saved.total}))
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(leave).remove)
        result = forward()  # with its graph, which holds what was counted
    del result
    return saved.total - sum(inner) + sum(outputs) + max(inner, default=0)


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory this process can still get, on its GPU or its machine; None if that is not known.

    On a machine, limits of its control group count, such as those of containers and of SLURM.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    values = [read_meminfo(Path("/proc/meminfo")), cgroup_room(Path("/sys/fs/cgroup"))]
    return min((value for value in values if value is not None), default=None)


def read_meminfo(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def cgroup_room(folder: Path) -> int | None:
    """Return the bytes up to the limit of a control group, version 2 or 1; files in its cache count as free."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # without a limit it is "max", or a huge number
            room = int((folder / limit).read_text()) - int((folder / usage).read_text())
            lines = (folder / limit).with_name("memory.stat").read_text().splitlines()
            return room + int(dict(line.split() for line in lines).get(cache, 0))
    return None

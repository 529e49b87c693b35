"""One process or many: device and backend are picked here, and everything that crosses processes goes through here."""

import inspect
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Process:
    """This process among all: rank from 0 to num_processes - 1, and the device it computes on."""

    rank: int
    num_processes: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_process(local_rank: int = 0) -> Process:
    """Join the other processes if a launcher (torchrun, torch.distributed.launch) started several.

    GPUs talk through NCCL, one process each; without GPUs processes talk through gloo.

    Args:
        local_rank: place on this machine, where the launcher did not put it into the environment.

    Raises:
        ValueError: more processes than GPUs on this machine.
    """
    rank = int(os.environ.get("RANK", 0))
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} on this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                f"lower --nproc_per_node, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if num_processes > 1:
        join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Process(rank, num_processes, device)


def join_processes(backend: str) -> None:
    """Meet the other processes.

    Hosts talk through gloo also where GPUs do through NCCL: about stopping, without waiting for the device. Where
    a launcher's store outlives its restarts, each meets in a place of its own; some versions of torch would find the
    addresses of dead processes. Else the store is new, and a node that came back has counted fewer restarts.
    """
    store, rank, num_processes = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_processes)


def stop_process() -> None:
    """Part from the other processes.

    Gloo's threads free the tensors of the last exchange, for which they need Python's lock. Up to torch 2.7 at least,
    the group is destroyed with that lock held and waits for them for ever: they get their turn before.
    """
    if dist.is_initialized():
        time.sleep(0.1)
        dist.destroy_process_group()


def wrap_ddp(model: nn.Module, process: Process, *, find_unused_parameters: bool = False) -> nn.Module:
    """The model wrapped in DDP where there are several processes, else as it is.

    Buffers are not broadcast from the first process: `average_buffers` makes them equal after each step.
    """
    if process.num_processes == 1:
        return model
    parameters = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    # torch 2.15 renamed the argument.
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[process.device] if process.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
        **{sync_buffers: False},  # type: ignore[arg-type]
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Within: backward passes add up gradients on this process alone (DDP's no_sync)."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place, the same on each."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def min_over_processes(values: Tensor) -> Tensor:
    """The element-wise smallest of a tensor over all processes, in place, the same on each."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def max_over_processes(values: Tensor) -> Tensor:
    """The element-wise largest of a tensor over all processes, in place, the same on each."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def trained_buffers(model: nn.Module) -> list[Tensor]:
    """Floating-point buffers that training changes. Those of frozen layers are not among them: a mean of equal numbers
    over three processes may differ from them in the last digit.
    """
    buffers = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not own or any(parameter.requires_grad for parameter in own):
            constants = module._non_persistent_buffers_set  # they follow from settings, and are not trained
            named = module.named_buffers(recurse=False)
            buffers += [buffer for name, buffer in named if buffer.is_floating_point() and name not in constants]
    return buffers


def average_buffers(buffers: list[Tensor]) -> None:
    """Replace floating-point buffers (batch norm's running statistics) by their mean over all processes, in place.

    One message for all of them; it keeps the processes' models equal, so that any one's checkpoint speaks for all.
    """
    if not dist.is_initialized() or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    means = (sum_over_processes(flat) / dist.get_world_size()).split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [mean.view_as(buffer) for mean, buffer in zip(means, buffers, strict=True)])


def gather_objects(item: Any) -> list[Any]:
    """Every process's item, by rank, on every process."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items

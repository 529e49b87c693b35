"""Process group, device and collectives; with a single process the collectives do nothing."""

import ctypes
import gc
import os
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.config.errors import UserError
from utils.config.standard_streams import flush_standard_streams
from utils.distributed.heartbeat import HANG_SECONDS, Heartbeat, record_cuda_event

STOP_SECONDS = 8.0  # launchers kill 30 s after SIGTERM, of which a step and a checkpoint may take 20
CU_CTX_SCHED_BLOCKING_SYNC = 4  # of CUDA's driver
is_program = threading.Event()  # this Python process is for a run alone, unlike a notebook or a test


@dataclass(frozen=True)
class Process:
    """This process: rank from 0 to num_processes - 1, number of processes, device, and heartbeat if several.

    Attributes:
        has_sigterm: whether training has got SIGTERM, which a launcher sends once another process has failed.
        has_stopped: whether `stop_process` is through.
    """

    rank: int
    num_processes: int
    device: torch.device
    heartbeat: Heartbeat | None = field(default=None, compare=False)
    has_sigterm: threading.Event = field(default_factory=threading.Event, compare=False)
    has_stopped: threading.Event = field(default_factory=threading.Event, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def limit_stop(self, exit_code: int) -> None:
        """End a program's process in STOP_SECONDS if `stop_process` is not through by then. Everything has been saved.

        Freeing what a run used waits for loader workers, for the GPU, and for other processes.
        """

        def end_late() -> None:
            if not self.has_stopped.wait(STOP_SECONDS):
                flush_standard_streams()
                os._exit(exit_code)

        if is_program.is_set():
            threading.Thread(target=end_late, name="limit of the stop", daemon=True).start()


def start_process(local_rank: int = 0) -> Process:
    """Join the process group if a launcher (torchrun, torch.distributed.launch) started several processes.

    The backend is NCCL with one GPU per process, and gloo without GPUs. A heartbeat ends this process if another hangs.

    Args:
        local_rank: rank on this machine, if the launcher did not set LOCAL_RANK.

    Raises:
        UserError: there are more processes than GPUs on this machine, or the launcher's variables are wrong.
    """
    rank = launcher_number("RANK", 0)
    num_processes = launcher_number("WORLD_SIZE", 1, low=1)
    local_rank = launcher_number("LOCAL_RANK", local_rank)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} on this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                f"lower --nproc_per_node, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        sleep_while_waiting(device)
    if num_processes == 1:
        return Process(rank, num_processes, device)
    join_processes(device)
    record_event = record_cuda_event if device.type == "cuda" else None
    heartbeat = Heartbeat(connect_store(), rank, num_processes, record_event=record_event)
    heartbeat.start()
    return Process(rank, num_processes, device, heartbeat)


def sleep_while_waiting(device: torch.device) -> None:
    """Let threads that wait for a GPU sleep. By default they poll, and keep cores busy that loader workers need.

    PyTorch has no function for this. Where the driver does not take the setting, threads poll as before.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        handle = ctypes.c_int()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(handle), device.index) == 0:
            driver.cuDevicePrimaryCtxSetFlags_v2(handle, CU_CTX_SCHED_BLOCKING_SYNC)
    except (OSError, AttributeError):
        pass


def launcher_number(name: str, default: int, *, low: int = 0) -> int:
    """Return an environment variable that a launcher sets.

    Raises:
        UserError: it is no whole number, or below `low`.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < low:
        raise UserError(f"{name} {text!r}: must be a whole number, at least {low}; unset it, or start with torchrun")
    return int(text)


def join_processes(device: torch.device) -> None:
    """Initialize the process group.

    CPU tensors go through gloo even with NCCL, so that processes agree about stopping without waiting for the GPU.
    """
    try:
        store, rank, num_processes = next(dist.rendezvous("env://"))
    except ValueError as error:  # a variable is missing
        raise UserError(f"the processes cannot meet ({error}); start them with torchrun") from error
    backend, bound = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=with_prefix(store), rank=rank, world_size=num_processes, device_id=bound)


def with_prefix(store: dist.Store) -> dist.Store:
    """Return the part of the launcher's store that belongs to this start of the processes.

    If the store outlives the launcher's restarts, each restart has a prefix of its own, since some versions of torch
    would find the addresses of dead processes. Otherwise the store is new, and has no prefix, since a node that came
    back has counted fewer restarts.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def connect_store() -> dist.Store:
    """Return a second connection to the launcher's store, for another thread: calls wait for each other on one."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=HANG_SECONDS)
    return with_prefix(dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False))


def stop_process(process: Process) -> None:
    """End the heartbeat and destroy the process group.

    Gloo's threads need the GIL to free the tensors of the last collective. Up to torch 2.7 at least, the group is
    destroyed with the GIL held and waits for them forever, so they get time to finish before.
    """
    if process.heartbeat is not None:
        process.heartbeat.stop()
    # CUDA graphs that hold collectives have to go before their communicator, and loaders end their workers in order.
    gc.collect()
    if dist.is_initialized():
        time.sleep(0.1)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        dist.destroy_process_group()
    process.has_stopped.set()


def sum_over_processes(values: Tensor) -> Tensor:
    """All-reduce a tensor in place by its sum, and return it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def min_over_processes(values: Tensor) -> Tensor:
    """All-reduce a tensor in place by its element-wise minimum, and return it."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def max_over_processes(values: Tensor) -> Tensor:
    """All-reduce a tensor in place by its element-wise maximum, and return it."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def trained_buffers(model: nn.Module) -> list[Tensor]:
    """Return the floating-point buffers that training changes.

    Those of frozen layers are left out: averaged over three processes, equal numbers may change in the last bit.
    """
    buffers = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not own or any(parameter.requires_grad for parameter in own):
            constants = module._non_persistent_buffers_set  # constants that follow from the configuration
            named = module.named_buffers(recurse=False)
            buffers += [buffer for name, buffer in named if buffer.is_floating_point() and name not in constants]
    return buffers


def average_buffers(buffers: list[Tensor]) -> None:
    """Average floating-point buffers (batch norm's running statistics) over all processes, in place.

    It takes a single all-reduce, and keeps the models of all processes equal, so that one checkpoint is enough.
    """
    if dist.is_initialized() and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        scatter(sum_over_processes(flat) / dist.get_world_size(), buffers)


def broadcast_tensors(tensors: list[Tensor]) -> None:
    """Give the tensors of all processes the values that those of the first process have, in place."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.broadcast(flat, src=0)
        scatter(flat, same)


@torch.no_grad()
def scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copy the parts of a flat tensor to tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def gather_objects(item: Any) -> list[Any]:
    """All-gather an object: return those of all processes, by rank."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items

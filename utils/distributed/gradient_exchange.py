"""Adding up gradients over processes, during or after the backward pass; a CUDA graph can record it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.config.errors import UserError
from utils.distributed.process import average_buffers, broadcast_tensors, max_over_processes, trained_buffers

# All-reduces beside the backward pass hide their time, but hold multiprocessors that its kernels then wait for. Above
# this speed, which NVLink reaches and PCIe does not, a single one after the backward pass is faster.
FAST_BYTES_PER_SECOND = 80e9
SLICE_BYTES = 32 * 2**20
# The network's first layers have their gradients last, when no work is left to hide an exchange, so theirs is short.
LAST_SLICE_BYTES = 2**20
TIMED_REDUCTIONS = 5
ALIGNMENT = 64  # elements; the optimizer reads aligned tensors several elements at a time


class Slice:
    """Gradients that are exchanged together, in one flat tensor.

    Attributes:
        parameters: of one dtype, on one device.
        flat: their gradients, summed over the processes once exchanged.
        views: of `flat`, one per parameter, in its shape and memory format.
        missing: ids of the parameters whose gradient the backward pass has not computed yet.
        sources: gradients that are being copied to `flat`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self.views = [view_like(*pair) for pair in zip(self.flat.split(sizes), parameters, strict=True)]
        self.missing: set[int] = set()
        self.sources: list[Tensor] = []

    @torch.no_grad()
    def gather(self) -> None:
        """Copy the gradients to `flat`; zeros for parameters without one."""
        used = [(view, p.grad) for view, p in zip(self.views, self.parameters, strict=True) if p.grad is not None]
        if len(used) < len(self.views):
            self.flat.zero_()
        self.sources = [grad for _, grad in used]
        if used:
            torch._foreach_copy_([view for view, _ in used], self.sources)


class GradientExchange:
    """Sums a model's gradients over all processes, slice by slice, in the order in which they become ready.

    Call `start` before the last backward pass of a step and `finish` after it. Earlier backward passes accumulate
    gradients without exchange. On a GPU the exchange runs on a stream of its own, which `finish` joins; on a CPU it
    runs in gloo's threads.

    The sum is the mean if each process divides its loss by `num_processes` before the backward pass.

    Batch norms' running statistics are averaged, so that one checkpoint serves all processes. At construction
    all processes take the weights and buffers of the first.

    Args:
        model: on its device; the same architecture on all processes.
        find_unused: allow parameters without gradient; those without one on every process are not updated.
        overlaps: exchange during the backward pass; else all gradients are one slice, which is exchanged after it.
    """

    def __init__(self, model: nn.Module, *, find_unused: bool = False, overlaps: bool = True) -> None:
        broadcast_tensors(list(model.state_dict().values()))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = {id(p): name for name, p in named}
        self.find_unused = find_unused
        self.num_processes = dist.get_world_size()
        device = named[0][1].device
        split = split_parameters([p for _, p in named], overlaps=overlaps)
        self.slices = [Slice(parameters) for parameters in split]
        self.buffers = trained_buffers(model)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.works: list[dist.Work] = []
        self.num_sent = 0  # slices are sent in order, so that all processes agree
        self.is_started = False
        for s in self.slices:
            for parameter in s.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self.mark_ready, s))

    def start(self) -> None:
        """Let the next backward pass exchange gradients."""
        for s in self.slices:
            s.missing = {id(p) for p in s.parameters}
        self.num_sent, self.is_started = 0, True

    def mark_ready(self, s: Slice, parameter: Tensor) -> None:
        """Note that a gradient is ready, and send the slices that are complete; called by autograd.

        Raises:
            RuntimeError: the parameter got a gradient before in this backward pass, and it may have been sent.
        """
        if not self.is_started:
            return
        if id(parameter) not in s.missing:
            raise RuntimeError(f"{self.names[id(parameter)]} gets more than one gradient in a backward pass")
        s.missing.remove(id(parameter))
        while self.num_sent < len(self.slices) and not self.slices[self.num_sent].missing:
            self.send_next()

    def send_next(self) -> None:
        """Start to exchange the next slice; the gradients of its parameters become views of it."""
        s = self.slices[self.num_sent]
        self.num_sent += 1
        with self.on_own_stream():
            s.gather()
            if self.stream is None:
                self.works.append(dist.all_reduce(s.flat, async_op=True))
            else:
                dist.all_reduce(s.flat)
        for parameter, view in zip(s.parameters, s.views, strict=True):
            parameter.grad = view

    def finish(self) -> None:
        """Send the slices that are left, and let the current stream wait for all of them.

        Raises:
            UserError: a parameter has no gradient, and `find_unused` is off.
        """
        self.is_started = False
        unused = self.unused_parameters()
        while self.num_sent < len(self.slices):
            self.send_next()
        with self.on_own_stream():
            average_buffers(self.buffers)  # not earlier: the backward pass may read them
        for work in self.works:
            work.wait()
        self.works.clear()
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        for s in self.slices:
            s.sources = []
        for parameter in unused:
            parameter.grad = None

    def unused_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that have no gradient on any process.

        Raises:
            UserError: there is one on this process, and `find_unused` is off.
        """
        parameters = [p for s in self.slices for p in s.parameters]
        if self.find_unused:
            is_used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
            is_used = max_over_processes(is_used)  # on the CPU: it does not wait for a GPU
            return [p for p, used in zip(parameters, is_used.tolist(), strict=True) if not used]
        absent = [self.names[id(p)] for p in parameters if p.grad is None]
        if absent:
            raise UserError(
                f"TRAIN.FIND_UNUSED_PARAMS False: parameters without gradient, {len(absent)}, such as {absent[0]}; "
                f"freeze them, or add --find-unused-params"
            )
        return []

    @contextmanager
    def on_own_stream(self) -> Iterator[None]:
        """Run the context on the exchange's stream, after the earlier work of the current one."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield


def all_reduce_speed(device: torch.device) -> float | None:
    """Return the bytes per second that the slowest process sums with the others on GPUs; None on CPUs.

    It is the median of several sums, so that a process that is late once does not count.
    """
    if device.type != "cuda":
        return None
    tensor = torch.zeros(SLICE_BYTES, dtype=torch.uint8, device=device)
    dist.all_reduce(tensor)  # connects the processes
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_REDUCTIONS + 1)]
    for event in events:
        dist.all_reduce(tensor)
        event.record()
    events[-1].synchronize()
    milliseconds = median(begin.elapsed_time(end) for begin, end in pairwise(events))
    return SLICE_BYTES / (max_over_processes(torch.tensor(milliseconds)).item() / 1000)


def should_overlap(speed: float | None) -> bool:
    """Return whether to exchange during the backward pass, from the bytes per second of all-reduces on GPUs.

    Deterministic algorithms (`torch.use_deterministic_algorithms`) do at any speed, which may differ between starts:
    sums over more than two processes may depend on the slices.
    """
    return speed is None or speed < FAST_BYTES_PER_SECOND or torch.are_deterministic_algorithms_enabled()


def split_parameters(parameters: Sequence[nn.Parameter], *, overlaps: bool = True) -> list[list[nn.Parameter]]:
    """Split a network's parameters, given in the order of its layers, into slices in the order of its backward pass.

    Without `overlaps`, a slice is all of a dtype.
    """
    slices: list[list[nn.Parameter]] = []
    num_bytes, limit = 0, LAST_SLICE_BYTES
    for parameter in parameters:
        num_bytes += parameter.numel() * parameter.element_size()
        if not slices or (overlaps and num_bytes > limit) or parameter.dtype != slices[-1][0].dtype:
            limit = SLICE_BYTES if slices else LAST_SLICE_BYTES
            num_bytes = parameter.numel() * parameter.element_size()
            slices.append([])
        slices[-1].append(parameter)
    return slices[::-1]


def view_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """Return a view of the start of a flat tensor with the shape and, if dense, the memory format of a parameter."""
    if parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last):
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
    return flat[: parameter.numel()].view(parameter.shape)

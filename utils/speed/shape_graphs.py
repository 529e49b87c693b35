"""Forward and backward pass of a network's part as CUDA graphs, a pair for each frequent shape of images."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.logs.logger import logger
from utils.speed.compile import Capture

MAX_GRAPHS = 64  # pairs; memory for intermediate results is shared, so that each adds only its list of kernels
CALLS_PER_GRAPH = 100  # of a run, for which one pair may be recorded before any has been replayed
REPLAYS_PER_GRAPH = 10  # which save as much time as another recording takes
ALIGNMENT = 512  # bytes, as PyTorch's allocator aligns tensors
T = TypeVar("T")
Part = Callable[[Tensor], tuple[Tensor, ...]]


class FrequentShapes(Generic[T]):
    """Recordings by shape, at most `limit`; the least recently used one is dropped for another.

    A shape is recorded when it comes for the second time; the first time, libraries choose algorithms. Recording costs
    time, so there is a budget: CALLS_PER_GRAPH calls to come allow one recording, and so do REPLAYS_PER_GRAPH replays.
    Neither shapes that hardly ever return nor more shapes than `limit` can make a run noticeably slower.

    Args:
        num_calls: calls to come.
        limit: recordings that are kept.
    """

    def __init__(self, *, num_calls: int, limit: int = MAX_GRAPHS) -> None:
        self.limit = limit
        self.seen: set[Hashable] = set()
        self.recordings: dict[Hashable, T] = {}  # the least recently used first
        self.budget = REPLAYS_PER_GRAPH * (num_calls // CALLS_PER_GRAPH)  # in replays
        self.num_recorded = 0
        self.can_record = True

    def get(self, shape: Hashable, record: Callable[[], T | None]) -> T | None:
        """Return the recording to replay for a shape, made now if it is due, or None.

        `record` makes it, or returns None if that is impossible; after that no shape is recorded.
        """
        recording = self.recordings.pop(shape, None)
        if recording is None and self.is_due(shape):
            if len(self.recordings) == self.limit:
                del self.recordings[next(iter(self.recordings))]
            recording = record()
            self.can_record = recording is not None
            self.budget -= REPLAYS_PER_GRAPH
            self.num_recorded += self.can_record
        if recording is not None:
            self.recordings[shape] = recording
            self.budget += 1
        return recording

    def is_due(self, shape: Hashable) -> bool:
        """Return whether a shape has been seen before and may be recorded."""
        was_seen = shape in self.seen
        self.seen.add(shape)
        return was_seen and self.can_record and self.budget >= REPLAYS_PER_GRAPH

    def stop(self) -> bool:
        """Drop all recordings for good; return whether there were any."""
        had_any, self.can_record = bool(self.recordings), False
        self.recordings.clear()
        return had_any


class Arena:
    """Memory for tensors that recordings use in turn: what one of them has left there, the next one overwrites."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)

    def tensors(self, layouts: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors side by side with the shapes, strides and dtypes of tensors on the device "meta".

        To autograd they are not views of one tensor: writing to one does not change the others.
        """
        sizes = [-(-layout.nbytes // ALIGNMENT) * ALIGNMENT for layout in layouts]
        if sum(sizes) > len(self.memory):
            self.memory = torch.empty(sum(sizes), dtype=torch.uint8, device=self.memory.device)  # for later recordings
        parts = self.memory[: sum(sizes)].split(sizes)
        return [
            part[: layout.nbytes].view(layout.dtype).as_strided(layout.shape, layout.stride()).data
            for part, layout in zip(parts, layouts, strict=True)
        ]


def layout_of(tensor: Tensor) -> Tensor:
    """Return a tensor without data of the same shape, dtype and, if it is dense, strides."""
    return torch.empty_like(tensor.detach(), device="meta")


class RecordedPart:
    """Forward and backward pass for one shape of images; calling it is a differentiable function of the parameters.

    The outputs are overwritten by the next call for any shape, and the gradients of the parameters by its backward
    pass; between the two calls there must be one backward pass.

    Args:
        part: maps images to tensors.
        parameters: those whose gradients the backward pass computes.
        images: the images as they will be passed, of any values.
        layouts: of the outputs, see `layout_of`.
        arena: for images, outputs and their gradients.
        gradients: of the parameters, which the backward pass writes.
        pool: memory pool of all graphs; intermediate results of different recordings share it.
    """

    def __init__(
        self,
        part: Part,
        parameters: Sequence[nn.Parameter],
        images: Tensor,
        layouts: Sequence[Tensor],
        *,
        arena: Arena,
        gradients: Sequence[Tensor],
        pool: Any,
    ) -> None:
        self.part, self.parameters, self.gradients = part, list(parameters), list(gradients)
        static, *others = arena.tensors([layout_of(images), *layouts, *layouts])
        self.images, self.outputs, self.output_gradients = static, others[: len(layouts)], others[len(layouts) :]
        self.attached: tuple[Tensor, ...] = ()  # outputs of the forward pass that the backward pass is due for
        self.is_used = [True] * len(self.parameters)
        self.call_number = 0
        device_type = images.device.type
        self.images.copy_(images)
        torch.clear_autocast_cache()  # a cast weight of another step must not get into the graph, nor one out of it
        self.replay_forward = Capture(self.run_forward, warmup_calls=0, pool=pool)
        torch.clear_autocast_cache()
        with torch.autocast(device_type, enabled=False):
            self.replay_backward = Capture(self.run_backward, warmup_calls=0, pool=pool)

    @torch.enable_grad()
    def run_forward(self) -> None:
        self.attached = self.part(self.images)
        torch._foreach_copy_(self.outputs, [output.detach() for output in self.attached])

    def run_backward(self) -> None:
        found = torch.autograd.grad(self.attached, self.parameters, self.output_gradients, allow_unused=True)
        self.attached = ()
        self.is_used = [gradient is not None for gradient in found]
        pairs = [(target, source) for target, source in zip(self.gradients, found, strict=True) if source is not None]
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        return ReplayPart.apply(self, images, *self.parameters)


class ReplayPart(torch.autograd.Function):
    """The two graphs of a RecordedPart as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, recorded: RecordedPart, images: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        recorded.call_number += 1
        ctx.recorded, ctx.call_number = recorded, recorded.call_number
        recorded.images.copy_(images)
        recorded.replay_forward()
        return tuple(
            output.data for output in recorded.outputs
        )  # the next call writes to them, after the backward pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        recorded: RecordedPart = ctx.recorded
        assert ctx.call_number == recorded.call_number, "the outputs were overwritten before the backward pass"
        for parameter in recorded.parameters:  # of an earlier micro-batch, which may be what the graph writes to
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        torch._foreach_copy_(recorded.output_gradients, output_gradients)
        recorded.replay_backward()
        pairs = zip(recorded.gradients, recorded.is_used, strict=True)
        # New tensors on the same memory, which become the parameters' gradients without a copy.
        return (None, None, *(gradient.detach() if is_used else None for gradient, is_used in pairs))


class DenseTensors(torch.autograd.Function):
    """Tensors and their gradients as a recording has them: dense, both with the same strides.

    Convolutions and sums round differently for other strides.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.layouts = [layout_of(tensor) for tensor in tensors]
        return tuple(map(dense_copy, tensors, ctx.layouts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(dense_copy, gradients, ctx.layouts))


def dense_copy(tensor: Tensor, layout: Tensor) -> Tensor:
    """Return the tensor with the strides of another one, copied if they differ."""
    if tensor.stride() == layout.stride():
        return tensor.view_as(tensor)
    return torch.empty_strided(layout.shape, layout.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class GraphsByShape(Generic[T]):
    """Recordings of a function for frequent shapes of its inputs, which share their memory.

    Args:
        num_calls: calls to come.
        limit: shapes whose recordings are kept.
        work: names what is recorded, at the start of a log line.
    """

    def __init__(self, *, num_calls: int, limit: int = MAX_GRAPHS, work: str = "The step") -> None:
        self.num_calls, self.limit, self.work = num_calls, limit, work
        self.clear()

    def clear(self) -> None:
        """Drop all recordings and their memory; shapes are recorded again when they come again."""
        self.frequent: FrequentShapes[T] = FrequentShapes(num_calls=self.num_calls, limit=self.limit)
        self.layouts: dict[Hashable, list[Tensor]] = {}  # of the results
        self.arena: Arena | None = None
        self.pool: Any = None

    def find(self, shape: Hashable, device: torch.device, record: Callable[[Arena, list[Tensor]], T]) -> T | None:
        """Return the recording for a shape, made by `record` if it is due, from memory and the results' layouts.

        Returns None if there is none, after a log line if there could not be one.
        """
        return self.frequent.get(shape, lambda: self.try_to_record(shape, device, record))

    def try_to_record(
        self, shape: Hashable, device: torch.device, record: Callable[[Arena, list[Tensor]], T]
    ) -> T | None:
        reason = self.lack_of_memory(device)
        try:
            if reason:
                return None
            if self.arena is None:
                self.arena = Arena(device)
                self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            return record(self.arena, self.layouts[shape])
        except RuntimeError as error:  # also out of memory: graphs keep what they allocate
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            return None
        finally:
            if reason:
                few = (
                    "No more CUDA graphs are recorded"
                    if self.frequent.recordings
                    else f"{self.work} has no CUDA graphs"
                )
                logger.warning("%s: %s", few, reason)

    def lack_of_memory(self, device: torch.device) -> str:
        """Return why there is too little memory for recordings, or an empty string."""
        return lack_of_memory(device)

    def without_recording(self, shape: Hashable, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Call a function, and remember the layouts of its results; if memory does not suffice, drop the recordings."""
        try:
            outputs = function()
        except torch.OutOfMemoryError:
            if not self.frequent.stop():
                raise
            logger.warning("CUDA graphs are dropped, for lack of memory: %s runs without them", self.work.lower())
            self.arena = None
            torch.cuda.empty_cache()
            outputs = function()
        self.layouts[shape] = [layout_of(output) for output in outputs]
        return outputs


class ShapeGraphs(GraphsByShape[RecordedPart]):
    """A network's part that replays CUDA graphs for frequent shapes of images, and runs as it is for others.

    Results of both are the same, bit by bit. Random numbers continue from the generator's state. Forward and backward
    pass must run on the stream of captures, as in SideStreamStep.

    Args:
        part: maps images to tensors. It must neither wait for the device nor branch on values.
        parameters: all parameters that the part uses; those that need no gradient are left out.
        num_calls: calls to come.
        limit: shapes whose graphs are kept.
    """

    def __init__(
        self, part: Part, parameters: Sequence[nn.Parameter], *, num_calls: int, limit: int = MAX_GRAPHS
    ) -> None:
        super().__init__(num_calls=num_calls, limit=limit)
        self.part = part
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.gradients: list[Tensor] = []

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return self.part(images)
        shape = (images.shape, images.stride(), images.dtype)

        def record(arena: Arena, layouts: list[Tensor]) -> RecordedPart:
            if not self.gradients:
                self.gradients = Arena(images.device).tensors([layout_of(parameter) for parameter in self.parameters])
            parts = self.part, self.parameters, images, layouts
            return RecordedPart(*parts, arena=arena, gradients=self.gradients, pool=self.pool)

        recorded = self.find(shape, images.device, record)
        if recorded is not None:
            return recorded(images)
        return self.without_recording(shape, lambda: DenseTensors.apply(*self.part(images)))


def lack_of_memory(device: torch.device) -> str:
    """Return why a GPU's memory is too small for graphs beside the eager passes of other shapes, or an empty string."""
    if device.type != "cuda":
        return ""
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    needed = 2 * torch.cuda.max_memory_allocated(device)
    if needed <= available:
        return ""
    return f"they may need {needed / 2**30:.1f} GiB of memory, and there are {available / 2**30:.1f} GiB"

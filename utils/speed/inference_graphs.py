"""Functions without gradients as CUDA graphs, one for each frequent shape of their inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.speed.compile import Capture
from utils.speed.shape_graphs import Arena, GraphsByShape, layout_of

FIRST_RECORDINGS = 8  # before any has been replayed
NUM_CALLS = 100 * FIRST_RECORDINGS  # of an evaluation, as far as the budget for recordings is concerned
SMALLEST_FREE_SHARE = 0.25  # of the GPU's memory, without which nothing is recorded
Function = Callable[..., tuple[Tensor, ...]]


class RecordedFunction:
    """A function recorded for one shape of each input; its results are overwritten by the next call for any shape."""

    def __init__(
        self, function: Function, inputs: Sequence[Tensor], layouts: Sequence[Tensor], *, arena: Arena, pool: Any
    ) -> None:
        self.function = function
        tensors = arena.tensors([*map(layout_of, inputs), *layouts])
        self.inputs, self.outputs = tensors[: len(inputs)], tensors[len(inputs) :]
        torch._foreach_copy_(self.inputs, list(inputs))
        torch.clear_autocast_cache()  # a weight that was cast before must not get into the graph, nor one out of it
        self.replay = Capture(self.run, warmup_calls=0, pool=pool)
        torch.clear_autocast_cache()

    def run(self) -> None:
        torch._foreach_copy_(self.outputs, list(self.function(*self.inputs)))

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.replay()
        return tuple(self.outputs)


class InferenceGraphs(GraphsByShape[RecordedFunction]):
    """A function of tensors that replays CUDA graphs for frequent shapes, and runs as it is for others.

    A shape is recorded when it comes for the second time. Results are overwritten by the next call. The function's
    parameters must stay where they are; their values may change.

    Args:
        function: maps tensors to a sequence of tensors. It must neither wait for the device nor branch on values.
        num_calls: calls to come.
    """

    def __init__(self, function: Function, *, num_calls: int = NUM_CALLS) -> None:
        super().__init__(num_calls=num_calls, work="Evaluation")
        self.function = function

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        kind = inputs[0].device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        shape = (precision, *((x.shape, x.stride(), x.dtype) for x in inputs))

        def record(arena: Arena, layouts: list[Tensor]) -> RecordedFunction:
            return RecordedFunction(self.function, inputs, layouts, arena=arena, pool=self.pool)

        recorded = self.find(shape, inputs[0].device, record)
        if recorded is not None:
            return recorded(inputs)
        return self.without_recording(shape, lambda: tuple(self.function(*inputs)))

    def lack_of_memory(self, device: torch.device) -> str:
        if device.type != "cuda":
            return ""
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if free >= SMALLEST_FREE_SHARE * total:
            return ""
        return f"{free / 2**30:.1f} GiB of memory are free, and they need {SMALLEST_FREE_SHARE * total / 2**30:.1f} GiB"

"""Side streams of a GPU; on a CPU everything runs in order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:  # noqa: ARG001
    """Return the one stream of a purpose: cuBLAS keeps some 60 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def on_side_stream(device: torch.device, purpose: str) -> Iterator[None]:
    """Run the context on a side stream, after all earlier work and before all later work of the current stream."""
    if device.type != "cuda":
        yield
        return
    stream = side_stream(device, purpose)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def start_on_side_stream(compute: Callable[[], Tensor], device: torch.device, purpose: str) -> Callable[[], Tensor]:
    """Start to compute a tensor on a side stream.

    Returns:
        A function that lets the current stream wait for the tensor, and returns it. Until then the inputs of `compute`
        must not change.
    """
    if device.type != "cuda":
        result = compute()
        return lambda: result
    stream = side_stream(device, purpose)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result = compute()

    def wait() -> Tensor:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        result.record_stream(current)  # so that its memory is not reused too early
        return result

    return wait

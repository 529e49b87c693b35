"""Streams of a GPU beside the one that everything runs on; on a CPU there are none, and things happen in turn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:  # noqa: ARG001
    """One and the same for a purpose: cuBLAS keeps some 60 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def on_side_stream(device: torch.device, purpose: str) -> Iterator[None]:
    """Within: work after all that came before, and before all that comes after, but not on the present stream."""
    if device.type != "cuda":
        yield
        return
    stream = side_stream(device, purpose)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def start_beside(compute: Callable[[], Tensor], device: torch.device, purpose: str) -> Callable[[], Tensor]:
    """Begin to compute a tensor beside what comes next; what is returned lets the present stream wait for it.

    What `compute` reads must stay as it is until then.
    """
    if device.type != "cuda":
        result = compute()
        return lambda: result
    stream = side_stream(device, purpose)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result = compute()

    def wait() -> Tensor:
        present = torch.cuda.current_stream(device)
        present.wait_stream(stream)
        result.record_stream(present)  # so that its memory is not given to others too early
        return result

    return wait

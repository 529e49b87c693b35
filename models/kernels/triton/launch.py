"""What the kernels' launches share."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
INTERPRETED_MULTIPROCESSORS = 2  # on a CPU, where Triton's interpreter runs the kernels one program at a time


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device: make that the first argument's."""

    @wraps(launch)
    def call(*args: P.args, **options: P.kwargs) -> R:
        device = args[0].device  # type: ignore[attr-defined]
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return launch(*args, **options)

    return call


def token_stride(x: Tensor) -> tuple[Tensor, int]:
    """x (B, H, W, C) and the distance between its tokens; a copy where its tokens are not evenly spaced."""
    _, height, width, _ = x.shape
    stride = x.stride(2)
    is_even = x.stride(3) == 1 and x.stride(1) == width * stride and x.stride(0) == height * width * stride
    if not is_even:
        x = x.contiguous()
        stride = x.shape[3]
    return x, stride


def channel_block(channels: int, largest: int) -> int:
    """A power of two of channels for one program, at most `largest`."""
    return min(largest, triton.next_power_of_2(channels))


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision_of(dtype: torch.dtype) -> str:
    """How products of matrices of this dtype are computed: float32 exactly, not as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"

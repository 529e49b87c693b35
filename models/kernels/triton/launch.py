"""Helpers to launch kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.runtime.jit import KernelInterface

try:
    from triton.backends.nvidia.compiler import CUDAOptions
except ImportError:  # a Triton for other GPUs
    CUDAOptions = None

PACKAGE = __name__.rpartition(".")[0]
P = ParamSpec("P")
R = TypeVar("R")
# Programmatic dependent launch: a kernel starts while the one before it still runs, and waits for its results.
HAS_DEPENDENT_LAUNCH = hasattr(cuda, "gdc_wait") and hasattr(CUDAOptions, "launch_pdl")
INTERPRETED_MULTIPROCESSORS = 2  # on a CPU, where Triton's interpreter runs the kernels one program at a time


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Launch on the device of the first argument; Triton takes the current one."""

    @wraps(launch)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device  # type: ignore[attr-defined]
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return launch(*args, **kwargs)

    return call


@contextmanager
def without_launches() -> Iterator[None]:
    """Context in which this package's kernels do nothing, so that their results are whatever is in memory.

    This is so in all threads: autograd has one of its own. Another thread may need the kernels of other packages.
    """
    launcher = KernelInterface.__getitem__

    def choose(kernel: Any, grid: Any) -> Callable[..., Any]:
        own = kernel
        while hasattr(own, "fn"):  # decorators
            own = own.fn
        return do_nothing if own.__module__.startswith(PACKAGE) else launcher(kernel, grid)

    KernelInterface.__getitem__ = choose
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launcher


def do_nothing(*_: object, **__: object) -> None:
    pass


def token_stride(x: Tensor) -> tuple[Tensor, int]:
    """Return x (B, H, W, C) and the stride of its tokens; a contiguous copy if they are not evenly spaced."""
    _, height, width, _ = x.shape
    stride = x.stride(2)
    is_even = x.stride(3) == 1 and x.stride(1) == width * stride and x.stride(0) == height * width * stride
    if not is_even:
        x = x.contiguous()
        stride = x.shape[3]
    return x, stride


def channel_block(channels: int, largest: int) -> int:
    """Return a power of two of channels for one program, at most `largest`."""
    return min(largest, triton.next_power_of_2(channels))


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def matmul_precision(dtype: torch.dtype) -> str:
    """Return tl.dot's input precision for a dtype: float32 exactly, not as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


if HAS_DEPENDENT_LAUNCH:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def launch_dependents(PDL: tl.constexpr):
        """With PDL, let the next kernel start once all programs of this one have called this, if it is launched so."""
        if PDL:
            gdc_launch_dependents()

    @triton.jit
    def wait_for_previous(PDL: tl.constexpr):
        """With PDL, wait until the previous kernel has ended and its results are in memory.

        Parameters may be loaded earlier: what wrote them ended before an earlier kernel of the model began.
        """
        if PDL:
            gdc_wait()

else:

    @triton.jit
    def launch_dependents(PDL: tl.constexpr):
        """Do nothing: this Triton knows no such launches."""

    @triton.jit
    def wait_for_previous(PDL: tl.constexpr):
        """Do nothing: the previous kernel has ended."""


@lru_cache
def can_launch_dependent(device: torch.device) -> bool:
    """Return whether kernels on this device can start beside the previous one: on NVIDIA GPUs since Hopper."""
    return HAS_DEPENDENT_LAUNCH and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Return the arguments with which a kernel that calls `wait_for_previous` is launched."""
    return {"PDL": True, "launch_pdl": True} if can_launch_dependent(device) else {"PDL": False}

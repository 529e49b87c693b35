"""Whether the Triton kernels take a tensor; nothing here needs Triton to be installed."""

import logging
from functools import lru_cache

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_WIDTH = 1024  # channels that one program normalizes
HEAD_WIDTHS = (16, 32, 64, 128)
GRIDS = (7, 14)  # up to these many rows, and beyond, grids are cut into tiles of other sizes

logger = logging.getLogger("mlla")


def takes(
    choice: str,
    x: Tensor,
    kernel: str,
    *,
    channels: int,
    head_width: int = 32,
    norm: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether a kernel computes tokens x (B, H, W, C), or images (B, C, H, W), for a MODEL.KERNELS of `choice`.

    "auto" asks the kernel first to do a small problem right, forward and backward, once for each width and dtype.
    `channels` is the width that the kernel sees: C, or a hidden layer's; `dtype` what it computes in, if that
    is not x's.

    Raises:
        ValueError: `choice` is "triton" and it cannot.
    """
    if choice == "torch" or x.device.type == "meta":
        return False
    dtype = dtype or x.dtype
    reason = missing_triton(x.device.type) or unsupported_reason(dtype, channels, head_width, norm)
    if not reason and x.shape[0] == 0:
        return False  # there is nothing to compute
    if not reason and choice == "auto":
        rows = 6 if x.shape[1] <= GRIDS[0] else 12 if x.shape[1] <= GRIDS[1] else 17
        reason = failed_trial(kernel, x.device, dtype, channels, head_width, rows)
    return not reason or fall_back(choice, reason)


def fall_back(choice: str, reason: str) -> bool:
    """False, and the reason in the log.

    Raises:
        ValueError: `choice` is "triton".
    """
    if choice == "triton":
        raise ValueError(f"MODEL.KERNELS triton: {reason}; use auto or torch")
    say_once(reason)
    return False


def unsupported_reason(dtype: torch.dtype, channels: int, head_width: int, norm: nn.Module | None) -> str:
    """Why the kernels do not know such tokens, or an empty string."""
    if dtype not in DTYPES:
        return f"they know no {dtype}"
    if norm is not None and channels > LARGEST_WIDTH:
        return f"{channels} channels are more than {LARGEST_WIDTH}"
    if head_width not in HEAD_WIDTHS:
        return f"heads of {head_width} channels; they know {', '.join(map(str, HEAD_WIDTHS))}"
    if norm is not None and type(norm) is not nn.LayerNorm:
        return f"they know LayerNorm, not {type(norm).__name__}"
    if norm is not None and (norm.weight is None or norm.bias is None):
        return "they know no LayerNorm without weight and bias"
    return ""


@torch.compiler.assume_constant_result
def missing_triton(device_type: str) -> str:
    """Why the kernels cannot run on this kind of device, or an empty string."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return f"there is no Triton for the device {device_type}"
    if torch.version.hip is not None:
        return "they were written for NVIDIA's GPUs"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return "the GPU is older than Ampere" if torch.cuda.get_device_capability()[0] < 8 else ""


@torch.compiler.assume_constant_result
def failed_trial(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_width: int, rows: int
) -> str:
    """Why a kernel is not to be trusted here, or an empty string; found out once."""
    return remembered_trial(kernel, device, dtype, int(channels), int(head_width), rows)


@lru_cache
def remembered_trial(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_width: int, rows: int
) -> str:
    from models.kernels import self_test

    return self_test.run(
        kernel, device, dtype, channels, head_width, rows=rows, batch=self_test.full_batch(device, channels)
    )


@torch.compiler.assume_constant_result
def say_once(reason: str) -> None:
    remember_and_say(reason)


@lru_cache
def remember_and_say(reason: str) -> None:
    logger.info("plain PyTorch instead of Triton kernels: %s", reason)

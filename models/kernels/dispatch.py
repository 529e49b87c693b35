"""Choice between Triton kernels and eager PyTorch; imports no Triton."""

import logging
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor, nn

from models.kernels import verdicts
from models.kernels.triton import LARGEST_WIDTH
from models.kernels.verdicts import Case

MODES = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128)
# Grids of up to so many rows share their tiles; the self-test takes the number of rows beside it for them.
GRID_CLASSES = ((7, 6), (14, 12))
LARGE_GRID_ROWS = 17
Problem = tuple[torch.device, torch.dtype, Case]
VERDICTS: dict[Problem, str] = {}  # of this process
SET_UP: set[torch.device] = set()  # devices on which a run has tested its kernels
ASSUMED: list[set[Problem]] = []  # where there is one, problems without a verdict go there, and count as passed

logger = logging.getLogger("mlla")


class KernelsUnavailableError(ValueError):
    """MODEL.KERNELS is triton, and the kernels cannot compute the model."""


def can_run(mode: str, x: Tensor) -> bool:
    """Return whether any kernel can compute x, on its device; that none can on a CPU is not worth a line of the log.

    Raises:
        KernelsUnavailableError: `mode` is "triton" and there is no Triton for the device.
    """
    device_type = x.device.type
    if mode == "torch" or device_type == "meta":
        return False
    reason = missing_triton(device_type)
    if reason and mode == "auto" and device_type == "cpu":
        return False
    return not reason or fall_back(mode, reason)


def check_mode(mode: str, device: torch.device) -> None:
    """Raise KernelsUnavailableError if `mode` is "triton" and there is no Triton for the device."""
    reason = missing_triton(device.type) if mode == "triton" else ""
    if reason:
        fall_back(mode, reason)


def supports(
    mode: str,
    x: Tensor,
    kernel: str,
    *,
    channels: int,
    head_dim: int = 32,
    dtype: torch.dtype | None = None,
    reason: str = "",
    only_tested: bool = False,
) -> bool:
    """Return whether a kernel computes tokens x (B, H, W, C), or images (B, C, H, W), for which `can_run`.

    Args:
        mode: MODEL.KERNELS. "auto" trusts a kernel that passed its self-test, which runs here where set-up ran none.
        x: the input.
        kernel: its name.
        channels: the width that the kernel sees: C, or that of a hidden layer; from a module, since torch.compile turns
            sizes of x into symbols.
        head_dim: channels of an attention head, likewise.
        dtype: what the kernel computes in; None for that of x.
        reason: why the kernels do not support the module, or "".
        only_tested: return False if a run's set-up has left out this kernel's self-test.

    Raises:
        KernelsUnavailableError: `mode` is "triton" and the kernel cannot compute this.
    """
    dtype = dtype or x.dtype
    shape = x.shape
    if shape[0] == 0:
        return False  # there is nothing to compute
    if dtype not in DTYPES:
        reason = f"the kernels do not support {dtype}"
    if not reason and mode == "auto":
        if only_tested and is_left_out(kernel, x.device, dtype, channels, head_dim, self_test_rows(shape[1])):
            return False
        reason = failed_self_test(kernel, x.device, dtype, channels, head_dim, self_test_rows(shape[1]))
    return not reason or fall_back(mode, reason)


def fall_back(mode: str, reason: str) -> bool:
    """Log the reason once and return False.

    Raises:
        KernelsUnavailableError: `mode` is "triton".
    """
    if mode == "triton":
        raise KernelsUnavailableError(f"MODEL.KERNELS triton: {reason}; use auto or torch")
    log_fallback(reason)
    return False


def unsupported_reason(channels: int, head_dim: int, norm: nn.Module) -> str:
    """Return why the kernels do not support blocks of this width, head dim and norm, or an empty string."""
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} channels; the kernels support {', '.join(map(str, HEAD_DIMS))}"
    if channels > LARGEST_WIDTH:
        return f"{channels} channels are more than {LARGEST_WIDTH}"
    if type(norm) is not nn.LayerNorm:
        return f"the kernels support LayerNorm, not {type(norm).__name__}"
    if norm.weight is None or norm.bias is None:
        return "the kernels do not support LayerNorm without weight and bias"
    return ""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer computes x: its own, or that of autocast."""
    kind = x.device.type
    is_cast = x.dtype in DTYPES and kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast else x.dtype


def self_test_rows(rows: int) -> int:
    """Return how many rows of tokens the self-test takes for grids of `rows` rows."""
    for most, tested in GRID_CLASSES:
        if rows <= most:
            return tested
    return LARGE_GRID_ROWS


@torch.compiler.assume_constant_result
def missing_triton(device_type: str) -> str:
    """Return why no kernel can run on this kind of device, or an empty string."""
    return find_missing_triton(device_type)


@lru_cache
def find_missing_triton(device_type: str) -> str:
    if device_type != "cuda" or not torch.cuda.is_available():
        return f"there is no Triton for the device {device_type}"
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return "the GPU is older than Ampere" if torch.cuda.get_device_capability()[0] < 8 else ""


@torch.compiler.assume_constant_result
def failed_self_test(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_dim: int, rows: int
) -> str:
    """Return why a kernel is not to be trusted for this problem, or an empty string."""
    return self_test_verdict(kernel, device, dtype, int(channels), int(head_dim), int(rows))


@torch.compiler.assume_constant_result
def is_left_out(kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_dim: int, rows: int) -> bool:
    """Return whether a run's set-up has tested kernels without this problem."""
    case = kernel, int(channels), int(head_dim), int(rows)
    return device in SET_UP and case not in known_verdicts([case], device, dtype)


def self_test_verdict(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_dim: int, rows: int
) -> str:
    """Return a kernel's verdict, from this process's table, from the disk, or else by running its self-test."""
    case = kernel, channels, head_dim, rows
    if case not in known_verdicts([case], device, dtype):
        if ASSUMED:
            ASSUMED[-1].add((device, dtype, case))
            return ""
        add_verdicts({case: solve(case, device, dtype)}, device, dtype)
    return VERDICTS[device, dtype, case]


def known_verdicts(cases: list[Case], device: torch.device, dtype: torch.dtype) -> dict[Case, str]:
    """Return the verdicts on those of the cases that this process or an earlier one has tested."""
    if any((device, dtype, case) not in VERDICTS for case in cases):
        for case, reason in verdicts.load(device, dtype).items():
            VERDICTS.setdefault((device, dtype, case), reason)
    return {case: VERDICTS[device, dtype, case] for case in cases if (device, dtype, case) in VERDICTS}


def add_verdicts(found: dict[Case, str], device: torch.device, dtype: torch.dtype) -> None:
    """Put verdicts into this process's table and on disk."""
    VERDICTS.update({(device, dtype, case): reason for case, reason in found.items()})
    verdicts.save(device, dtype, found)


def solve(case: Case, device: torch.device, dtype: torch.dtype) -> str:
    """Run the self-test of a kernel; return what is wrong with it, or an empty string."""
    kernel, channels, head_dim, rows = case
    if ":" in kernel:
        module, _, name = kernel.partition(" ")[0].partition(":")
        return import_module(module).find_error(name, device)
    from models.kernels import problems  # which needs Triton

    batch = problems.full_batch(device, channels)
    return problems.find_error(kernel, device, dtype, channels, head_dim, rows=rows, batch=batch)


@torch.compiler.assume_constant_result
def log_fallback(reason: str) -> None:
    log_fallback_once(reason)


@lru_cache
def log_fallback_once(reason: str) -> None:
    logger.info("Triton kernels: falls back to eager PyTorch: %s", reason)

"""Choice between Triton's kernels and torchvision's functions."""

from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from data.kernel_dispatch import VERDICTS, Check, failure, verdict
from models.kernels.dispatch import can_run, log_fallback_once

# Module of each kernel's check, check_<name>.
MODULES = {"adding": "fpn", "matching": "matching", "pasting": "masks", "pooling": "pooling", "suppressing": "nms"}
KERNELS = tuple(f"{__name__}:{name}" for name in MODULES)  # their names for the self-test at set-up


def kernel_works(kernels: str, x: Tensor, check: Check) -> bool:
    """Return whether a kernel computes x: on a GPU, if it passes its check; with "triton" without a check.

    Args:
        kernels: MODEL.KERNELS.
        x: on the device.
        check: returns where the kernel's results are wrong; called once per device and process.

    Raises:
        KernelsUnavailableError: `kernels` is "triton" and there is no Triton for the device.
    """
    return can_run(kernels, x) and (kernels == "triton" or passes(check, x.device))


@lru_cache
def passes(check: Check, device: torch.device) -> bool:
    """Return whether a kernel runs on a device and passes its check; else log why not."""
    reason = verdict(check, device)
    if reason:
        log_fallback_once(f"{check.__name__.removeprefix('check_')} in the detector: {reason}"[:300])
    return not reason


def find_error(name: str, device: torch.device) -> str:
    """Return what is wrong with one of the kernels in MODULES, or an empty string."""
    return failure(check_of(name), device)


def set_verdict(name: str, device: torch.device, error: str) -> None:
    """Take the result of `find_error` from elsewhere, such as another process."""
    VERDICTS[check_of(name), device] = error


def check_of(name: str) -> Check:
    return getattr(import_module(f"{__package__}.{MODULES[name]}"), f"check_{name}")

"""Choice between Triton's kernels and torchvision's functions."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from data.kernel_dispatch import failure
from models.kernels.dispatch import can_run, log_fallback_once

Check = Callable[[torch.device], Tensor]


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
    reason = failure(check, device)
    if reason:
        log_fallback_once(f"{check.__name__.removeprefix('check_')} in the detector: {reason}"[:300])
    return not reason

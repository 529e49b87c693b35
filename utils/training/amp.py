"""Mixed precision (AMP): one code path for float32, float16 and bfloat16, on GPUs and CPUs."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Autocast and gradient scaler of a run; both do nothing when they are not needed.

    Attributes:
        device_type: "cuda" or "cpu".
        dtype: autocast's dtype; float32 disables autocast.
        scaler: scales the loss for float16, whose gradients would underflow; disabled for other dtypes.
    """

    device_type: str
    dtype: torch.dtype
    scaler: torch.amp.GradScaler

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def make_precision(device: torch.device, *, amp: bool, dtype: str) -> Precision:
    """Return the precision for a device: float32, or with `amp` mixed precision.

    Args:
        device: the device to train or evaluate on.
        amp: use mixed precision.
        dtype: "auto", "float16" or "bfloat16"; "auto" is bfloat16, but float16 on GPUs that only emulate bfloat16
            (before Ampere).
    """
    if not amp:
        chosen = torch.float32
    elif dtype == "auto":
        old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
        chosen = torch.float16 if old_gpu else torch.bfloat16
    else:
        chosen = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    return Precision(device.type, chosen, torch.amp.GradScaler(device.type, enabled=chosen is torch.float16))

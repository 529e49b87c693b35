"""The forget gate's scan with Triton, and its place in a model; models/unified/scan.py is the eager reference."""

import torch
from torch import Tensor, nn

from models.kernels.dispatch import can_run, fall_back
from models.unified.block import UnifiedAttention
from models.unified.scan import chunk_size, chunked_scan, gated_scan, register_scan

LARGEST_STATE = 64  # state rows that fit the registers


@torch.library.custom_op("mlla::triton_scan", mutates_args=())
def triton_scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `chunked_scan` with Triton, for float32 tensors on a GPU and at most LARGEST_STATE state rows."""
    from models.kernels.triton import scan

    return scan.scan(q, k, v, delta, a, chunk_size(v))


@torch.library.custom_op("mlla::triton_scan_backward", mutates_args=())
def triton_scan_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `chunked_scan_backward` with Triton."""
    from models.kernels.triton import scan

    return scan.scan_backward(grad, q, k, v, delta, a, states, chunk_size(v))


register_scan(triton_scan, triton_scan_backward, name="triton_scan")


class FusedUnifiedAttention(UnifiedAttention):
    """`UnifiedAttention` whose scan is computed by Triton where it can be; made by `use_scan_kernels`."""

    kernels: str

    def scan(self, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> Tensor:
        operator = triton_scan if supports_scan(self.kernels, v, a) else chunked_scan
        return gated_scan(q, k, v, delta, a, operator=operator)


def use_scan_kernels(model: nn.Module, mode: str) -> None:
    """Let the forget gates in a model use the Triton scan ("auto", "triton"), or the eager one ("torch").

    Swaps the class of its attention modules; parameters and names stay as they are.
    """
    for module in model.modules():
        if type(module) in (UnifiedAttention, FusedUnifiedAttention):
            module.__class__ = UnifiedAttention if mode == "torch" else FusedUnifiedAttention
            module.kernels = mode  # type: ignore[assignment]


def supports_scan(mode: str, v: Tensor, a: Tensor) -> bool:
    """Return whether Triton computes the scan of v (B, heads, N, e) and a (heads, d, e); mode is MODEL.KERNELS.

    Raises:
        ValueError: `mode` is "triton" and it cannot.
    """
    if v.shape[0] == 0 or not can_run(mode, v):
        return False
    reason = ""
    if v.dtype is torch.float64:  # 16 bits are computed in float32
        reason = "the kernels do not support torch.float64"
    elif a.shape[1] > LARGEST_STATE:
        reason = f"states of {a.shape[1]} rows; the forget gate's kernel supports up to {LARGEST_STATE}"
    return not reason or fall_back(mode, reason)

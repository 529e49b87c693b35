"""Feature pyramid (Lin et al., arXiv 1612.03144): from maps at strides 4 to 32 to five maps of one width."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.detection.model.kernel_dispatch import kernel_works


class NamedConv(nn.Module):
    """Convolution under the name `conv`, as in the published weights."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """Feature pyramid from maps (B, widths[i], H_i, W_i) to maps (B, width, H_i, W_i) and one more.

    The extra map takes every other row and column of the last one. `kernels` is MODEL.KERNELS.
    """

    def __init__(self, widths: Sequence[int], width: int, *, kernels: str = "torch") -> None:
        super().__init__()
        self.kernels = kernels
        self.lateral_convs = nn.ModuleList(NamedConv(nn.Conv2d(channels, width, 1)) for channels in widths)
        self.fpn_convs = nn.ModuleList(NamedConv(nn.Conv2d(width, width, 3, padding=1)) for _ in widths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = add_upsampled(merged[i - 1], merged[i], kernels=self.kernels)
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=True)]
        return [*outputs, outputs[-1][:, :, ::2, ::2]]  # (B, width, ceil(H / 2), ceil(W / 2))


def add_upsampled(fine: Tensor, coarse: Tensor, *, kernels: str = "torch") -> Tensor:
    """Return fine (B, C, H, W) plus the nearest cells of coarse (B, C, h, w), in fine's dtype.

    Twice the size is the rule, and takes one pass over the tensors; autocast would interpolate in float32.

    Args:
        fine: the larger map.
        coarse: the smaller one.
        kernels: MODEL.KERNELS.
    """
    (height, width), (coarse_height, coarse_width) = fine.shape[2:], coarse.shape[2:]
    if (height, width) != (2 * coarse_height, 2 * coarse_width) or fine.dtype != coarse.dtype:
        return fine + F.interpolate(coarse, (height, width), mode="nearest")
    if kernel_works(kernels, fine, check_adding):
        from downstream.detection.model.triton_fpn import add_upsampled_with_kernel  # imports Triton

        return add_upsampled_with_kernel(fine, coarse)
    return add_upsampled_eagerly(fine, coarse)


def add_upsampled_eagerly(fine: Tensor, coarse: Tensor) -> Tensor:
    """Return fine (B, C, 2 h, 2 w) plus the nearest cells of coarse (B, C, h, w)."""
    height, width = coarse.shape[2:]
    blocks = fine.permute(0, 2, 3, 1).unflatten(2, (width, 2)).unflatten(1, (height, 2))
    total = blocks + coarse.permute(0, 2, 3, 1)[:, :, None, :, None]  # (B, h, 2, w, 2, C), so that gradients are NHWC
    return total.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def check_adding(device: torch.device) -> Tensor:
    """Return where the kernels' sums or gradients differ from PyTorch's by more than rounding."""
    from downstream.detection.model.triton_fpn import add_upsampled_with_kernel

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 256, 6, 10), (2, 256, 3, 5), (2, 256, 6, 10))
    fine, coarse, upstream = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    results = []
    for add in (add_upsampled_with_kernel, add_upsampled_eagerly):
        with torch.autocast(device.type, enabled=False), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (fine, coarse)]
            total = add(*inputs)
            results.append([total.detach(), *torch.autograd.grad(total, inputs, upstream)])
    found, expected = (torch.cat([x.float().flatten() for x in own]) for own in results)
    return ~torch.isclose(found, expected, rtol=0.02, atol=0.02).cpu()

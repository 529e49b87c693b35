"""RoIAlign of regions, each from the map of the feature pyramid for its size."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from downstream.detection.model.kernel_dispatch import kernel_works

STRIDES = (4, 8, 16, 32)
FINEST_SIDE = 56  # pixels; boxes twice as large (square root of the area) use the next coarser map


def pool_regions(maps: Sequence[Tensor], boxes: Tensor, images: Tensor, grid: int, *, kernels: str = "torch") -> Tensor:
    """Return RoIAlign of boxes (R, 4) of images (R,), each from the map for its size: (R, C, grid, grid).

    The host does not wait for the device.

    Args:
        maps: (B, C, H, W) at strides 4, 8, 16 and 32; others after them are ignored.
        boxes: pixels of the images.
        images: index of each box's image.
        grid: bins per side.
        kernels: MODEL.KERNELS. Gradients of kernel and torchvision's function are sums in any order; where that is
            not allowed, torchvision's function computes them in one.
    """
    maps = maps[: len(STRIDES)]  # the fifth is the RPN's alone
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
    levels = torch.floor(torch.log2(sides / FINEST_SIDE + 1e-6)).clamp(0, len(STRIDES) - 1)  # (R,)
    is_any_order = not torch.are_deterministic_algorithms_enabled()
    if is_any_order and kernel_works(kernels, boxes, check_pooling):
        from downstream.detection.model.triton_roi_align import pool_with_kernel  # imports Triton

        return pool_with_kernel(maps, boxes, images, levels, grid)
    return pool_with_torchvision(maps, boxes, images, levels, grid)


def pool_with_torchvision(maps: Sequence[Tensor], boxes: Tensor, images: Tensor, levels: Tensor, grid: int) -> Tensor:
    """Return RoIAlign of boxes (R, 4) of images (R,), each from the map of its level (R,): (R, C, grid, grid).

    Every map pools every box, but boxes of other maps as if they had no area, which reads nothing and gives 0.
    """
    pooled: Tensor | None = None
    for level, (stride, x) in enumerate(zip(STRIDES, maps, strict=True)):
        own = torch.where((levels == level)[:, None], boxes, 0)
        regions = torch.cat((images[:, None].to(boxes), own), dim=1)  # (R, 5)
        part = roi_align(x, regions, grid, 1 / stride, sampling_ratio=0, aligned=True)
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled


def check_pooling(device: torch.device) -> Tensor:
    """Return where the kernel's results or gradients differ from torchvision's by more than rounding."""
    from downstream.detection.model.triton_roi_align import pool_with_kernel

    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 256, 96 // s, 128 // s, generator=generator).to(device, torch.bfloat16) for s in STRIDES]
    corners = torch.rand(8, 2, generator=generator) * 120 - 20
    boxes = torch.cat((corners, corners + 8 * 2 ** (4 * torch.rand(8, 2, generator=generator))), dim=1).to(device)
    images, levels = (torch.arange(8, device=device) // n % m for n, m in ((1, 2), (2, 4)))
    upstream = torch.randn(8, 256, 2, 2, generator=generator).to(device, torch.bfloat16)
    results = []
    for pool, dtype in ((pool_with_kernel, torch.bfloat16), (pool_with_torchvision, torch.float32)):
        inputs = [x.to(dtype).requires_grad_() for x in maps]
        with torch.autocast(device.type, enabled=False), torch.enable_grad():
            pooled = pool(inputs, boxes, images, levels, 2)
            gradients = torch.autograd.grad(pooled, inputs, upstream.to(dtype))
        results.append(torch.cat([x.float().flatten() for x in (pooled.detach(), *gradients)]).cpu())
    found, expected = results
    return ~torch.isclose(found, expected, rtol=0.02, atol=0.02)

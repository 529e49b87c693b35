"""Triton kernels for RoIAlign from several maps at once, channels_last; same values as torchvision.ops.roi_align.

Eager reference: `pooling.pool_with_torchvision`. The mean over a bin's samples, each interpolated linearly along both
axes, is a weighted sum over the cells of the map around it, whose weights are products of one for the row and one for
the column. So a cell is read once for a bin, and in the backward pass added to once, not for each of the samples.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.triton.launch import channel_block, on_its_device

MAX_LEVELS = 4
COLUMNS = 4  # of a map, read at a time
LARGEST_BLOCK = 256  # channels of a program
WARPS = 1
SIZES = ["bins", *(f"{side}{level}" for level in range(MAX_LEVELS) for side in ("height", "width"))]


@triton.jit
def bin_samples(low, high, index, bins):
    """Return a bin's first sample, the distance of the next one, and their number, from the ends of a region."""
    side = tl.div_rn(high - low, bins.to(tl.float32))
    count = tl.maximum(tl.ceil(side).to(tl.int32), 0)
    step = tl.div_rn(side, tl.maximum(count, 1).to(tl.float32))
    return low + index * side + 0.5 * step, step, count


@triton.jit
def cells_around(first, step, count, size):
    """Return the first and the last cell of an axis that a bin's samples read; the last is before it if none does."""
    last = first + (count - 1) * step
    low = tl.minimum(tl.maximum(tl.floor(first), 0.0), size - 1.0).to(tl.int32)
    high = tl.minimum(tl.maximum(tl.floor(last) + 1, 0.0), size - 1.0).to(tl.int32)
    return low, tl.where(count > 0, high, low - 1)


@triton.jit
def cell_weights(cell, begin, CELLS: tl.constexpr, first, step, count, size):
    """Return the weights of an axis' cells, which are within CELLS from `begin` on: sums over a bin's samples.

    A sample counts for nothing beyond -1 or `size`; otherwise it is moved to the nearest cell if it is outside.
    """
    # Samples are more than half a cell apart if there are several.
    start = tl.where(count > 1, tl.maximum(tl.floor((begin - 1 - first) / step), 0.0), 0.0).to(tl.int32)
    weights = cell * 0.0
    for i in range(start, tl.minimum(start + 2 * CELLS + 5, count)):
        at = first + i * step
        is_inside = (at >= -1.0) & (at <= size)
        at = tl.minimum(tl.maximum(at, 0.0), size - 1.0)
        weights += tl.where(is_inside, tl.maximum(1.0 - tl.abs(at - cell), 0.0), 0.0)
    return weights


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    map0, map1, map2, map3, boxes, images, levels, pooled, channels, bins,
    height0, width0, height1, width1, height2, width2, height3, width3,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    """Store a bin's mean (channels,) in `pooled` (regions, bins, bins, channels).

    In the backward pass `pooled` has the means' gradient, which is added to the maps' gradients, float32.
    """
    region, place = tl.program_id(0) // (bins * bins), tl.program_id(0) % (bins * bins)
    level = tl.load(levels + region)
    if level == 0:
        cells, height, width = map0, height0, width0
    elif level == 1:
        cells, height, width = map1, height1, width1
    elif level == 2:
        cells, height, width = map2, height2, width2
    else:
        cells, height, width = map3, height3, width3
    scale = 0.25 / (1 << level).to(tl.float32)
    x1, y1 = tl.load(boxes + 4 * region) * scale - 0.5, tl.load(boxes + 4 * region + 1) * scale - 0.5
    x2, y2 = tl.load(boxes + 4 * region + 2) * scale - 0.5, tl.load(boxes + 4 * region + 3) * scale - 0.5
    first_y, step_y, count_y = bin_samples(y1, y2, place // bins, bins)
    first_x, step_x, count_x = bin_samples(x1, x2, place % bins, bins)
    top, bottom = cells_around(first_y, step_y, count_y, height)
    left, right = cells_around(first_x, step_x, count_x, width)
    share = 1.0 / tl.maximum(count_y * count_x, 1).to(tl.float32)

    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    own = pooled + tl.program_id(0).to(tl.int64) * channels + channel  # (1, CHANNELS)
    image = tl.load(images + region).to(tl.int64)
    if IS_BACKWARD:
        gradient = share * tl.load(own, mask=channel < channels, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS, CHANNELS), dtype=tl.float32)
    for begin in range(left, right + 1, COLUMNS):
        x = begin + tl.arange(0, COLUMNS)[:, None]
        of_column = cell_weights(x, begin, COLUMNS, first_x, step_x, count_x, width)
        ok = (x <= right) & (channel < channels)
        for y in range(top, bottom + 1):
            weights = of_column * cell_weights(y, y, 1, first_y, step_y, count_y, height)
            at = cells + ((image * height + y) * width + x) * channels + channel
            if IS_BACKWARD:
                tl.atomic_add(at, weights * gradient, mask=ok & (weights > 0), sem="relaxed")
            else:
                total += weights * tl.load(at, mask=ok, other=0.0).to(tl.float32)
    if not IS_BACKWARD:
        mean = share * tl.sum(total, axis=0, keep_dims=True)
        tl.store(own, mean.to(pooled.dtype.element_ty), mask=channel < channels)


@on_its_device
def launch(
    pooled: Tensor, maps: Sequence[Tensor], boxes: Tensor, images: Tensor, levels: Tensor, *, is_backward: bool
) -> None:
    """Launch the kernel on pooled regions (R, C, grid, grid) and maps (B, C, H, W), all channels_last."""
    num_regions, channels, grid, _ = pooled.shape
    if not pooled.numel():
        return
    padded = [*maps, *[maps[-1]] * (MAX_LEVELS - len(maps))]
    block = channel_block(channels, LARGEST_BLOCK)
    pool_kernel[(num_regions * grid**2, triton.cdiv(channels, block))](
        *(*padded, boxes, images, levels, pooled, channels, grid),
        *(side for x in padded for side in x.shape[2:]),
        COLUMNS=COLUMNS,
        CHANNELS=block,
        IS_BACKWARD=is_backward,
        num_warps=WARPS,
    )


class PoolRegions(torch.autograd.Function):
    """RoIAlign of boxes (R, 4), each from the map of its level (R,) at stride 4 * 2^level: (R, C, grid, grid)."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, images: Tensor, levels: Tensor, grid: int, *maps: Tensor) -> Tensor:
        maps = tuple(x.contiguous(memory_format=torch.channels_last) for x in maps)
        ctx.save_for_backward(boxes, images, levels)
        ctx.shapes = [x.shape for x in maps]
        pooled = torch.empty(
            (len(boxes), maps[0].shape[1], grid, grid),
            dtype=maps[0].dtype,
            device=boxes.device,
            memory_format=torch.channels_last,
        )
        launch(pooled, maps, boxes, images, levels, is_backward=False)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        options: Any = {"dtype": torch.float32, "device": gradient.device, "memory_format": torch.channels_last}
        maps = [torch.empty(shape, **options).zero_() for shape in ctx.shapes]
        launch(gradient, maps, *ctx.saved_tensors, is_backward=True)
        return (None, None, None, None, *(x.to(gradient.dtype) for x in maps))


def pool_with_kernel(maps: Sequence[Tensor], boxes: Tensor, images: Tensor, levels: Tensor, grid: int) -> Tensor:
    """Return RoIAlign as `pool_with_torchvision` does, in the maps' dtype, channels_last."""
    return PoolRegions.apply(boxes.float().contiguous(), images.int(), levels.int(), grid, *maps)

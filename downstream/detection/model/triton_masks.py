"""Triton kernel that pastes masks onto the image, from a grid over each box.

Eager reference: `masks.paste_eagerly`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import on_its_device

BLOCK = 1024  # pixels of a program
WARPS = 4


@triton.jit
def cells_between(pixel, low, high, SIZE: tl.constexpr):
    """Return the cell before a pixel's center along an axis, and the next one's weight, as grid_sample rounds them."""
    place = tl.div_rn(pixel + 0.5 - low, tl.maximum(high - low, 1e-6)) * 2 - 1
    at = ((place + 1) * SIZE - 1) * 0.5
    cell = tl.floor(at)
    return tl.minimum(tl.maximum(cell, -2.0), SIZE * 1.0).to(tl.int32), at - cell


@triton.jit
def load_cells(cells, row, column, ok, SIZE: tl.constexpr):
    is_inside = (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
    return tl.load(cells + row * SIZE + column, mask=ok & is_inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["height", "width"])
def paste_kernel(probabilities, boxes, masks, height, width, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store which pixels (height, width) belong to the mask of probabilities (SIZE, SIZE) over a box."""
    item = tl.program_id(1).to(tl.int64)
    x1, y1 = tl.load(boxes + 4 * item), tl.load(boxes + 4 * item + 1)
    x2, y2 = tl.load(boxes + 4 * item + 2), tl.load(boxes + 4 * item + 3)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, ok = index % width, index // width, index < height * width
    near = ok & (tl.minimum(x2 - x1, y2 - y1) + 0.0 * x > 0)  # only boxes with an area
    column, right = cells_between(x.to(tl.float32), x1, x2, SIZE)
    row, below = cells_between(y.to(tl.float32), y1, y2, SIZE)
    cells = probabilities + item * SIZE * SIZE
    total = load_cells(cells, row, column, near, SIZE) * ((1 - right) * (1 - below))
    total += load_cells(cells, row, column + 1, near, SIZE) * (right * (1 - below))
    total += load_cells(cells, row + 1, column, near, SIZE) * ((1 - right) * below)
    total += load_cells(cells, row + 1, column + 1, near, SIZE) * (right * below)
    tl.store(masks + item * height * width + index, ((total >= 0.5) & near).to(tl.uint8), mask=ok)


@on_its_device
def paste_with_kernel(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return masks (D, height, width) bool as `masks.paste_eagerly` does."""
    probabilities, boxes = probabilities.contiguous(), boxes.float().contiguous()
    masks = torch.empty(len(boxes), height, width, dtype=torch.uint8, device=boxes.device)
    if masks.numel():
        paste_kernel[(triton.cdiv(height * width, BLOCK), len(boxes))](
            *(probabilities, boxes, masks, height, width),
            SIZE=probabilities.shape[-1],
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return masks.view(torch.bool)

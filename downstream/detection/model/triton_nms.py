"""Triton kernel for non-maximum suppression within pyramid levels, the same bits as torchvision.ops.nms of a CPU.

Eager reference: `suppress_in_levels`. One program computes a level of an image, block by block: the boxes of a block
are compared with the survivors of all earlier blocks, then with each other.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from downstream.detection.model.structures import constant
from models.kernels.triton.launch import on_its_device

BLOCK = 64
WARPS = 8


@triton.jit
def load_boxes(boxes, index, count):
    """Return x1, y1, x2, y2 of boxes; zeros from `count` on."""
    ok = index < count
    x1 = tl.load(boxes + 4 * index, mask=ok, other=0.0)
    y1 = tl.load(boxes + 4 * index + 1, mask=ok, other=0.0)
    x2 = tl.load(boxes + 4 * index + 2, mask=ok, other=0.0)
    y2 = tl.load(boxes + 4 * index + 3, mask=ok, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def overlap_more(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, threshold):
    """Return whether the IoU of pairs of boxes is larger than the threshold; not where it is 0 / 0."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    shared = width * height
    areas = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)
    return tl.div_rn(shared, areas - shared) > threshold


@triton.jit(do_not_specialize=["num_boxes"])
def suppress_kernel(boxes, starts, survives, num_boxes, threshold, BLOCK: tl.constexpr):
    """Store which boxes (images, num_boxes, 4) survive in levels that begin at `starts`; the last entry is an end."""
    start = tl.load(starts + tl.program_id(1))
    count = tl.load(starts + tl.program_id(1) + 1) - start
    first = tl.program_id(0).to(tl.int64) * num_boxes + start
    boxes += 4 * first
    survives += first
    row = tl.arange(0, BLOCK)[:, None]  # of the better boxes
    column = tl.arange(0, BLOCK)[None, :]
    for begin in range(0, count, BLOCK):
        x1, y1, x2, y2 = load_boxes(boxes, begin + column, count)
        is_hit = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
        for earlier in range(0, begin, BLOCK):
            is_better = tl.load(survives + earlier + row).to(tl.int32)
            left, top, right, bottom = load_boxes(boxes, earlier + row, count)
            overlaps = overlap_more(left, top, right, bottom, x1, y1, x2, y2, threshold)
            is_hit |= tl.where(overlaps, is_better, 0)
        is_open = tl.where(begin + column < count, 1 - tl.max(is_hit, axis=0, keep_dims=True), 0)  # (1, BLOCK)
        left, top, right, bottom = load_boxes(boxes, begin + row, count)
        overlaps = overlap_more(left, top, right, bottom, x1, y1, x2, y2, threshold) & (row < column)
        # A box survives if no survivor before it overlaps. Each round settles at least one box more; when nothing
        # changes, all are.
        found = is_open
        num_changes = 1
        while num_changes > 0:
            is_better = tl.reshape(found, (BLOCK, 1))
            is_hit = tl.where(overlaps, is_better, 0)
            updated = is_open * (1 - tl.max(is_hit, axis=0, keep_dims=True))
            num_changes = tl.sum(tl.abs(updated - found))
            found = updated
        tl.store(survives + begin + column, found.to(tl.uint8), mask=begin + column < count)
        tl.debug_barrier()  # the program's other threads read it


@on_its_device
def suppress_with_kernel(boxes: Tensor, counts: Sequence[int], threshold: float) -> Tensor:
    """Return which boxes survive, (B, N) bool, as `suppress_in_levels` does."""
    boxes = boxes.contiguous()
    num_images, num_boxes = boxes.shape[:2]
    starts = constant((0, *accumulate(counts)), boxes.device, torch.int32)
    survives = torch.empty(num_images, num_boxes, dtype=torch.uint8, device=boxes.device)
    suppress_kernel[(num_images, len(counts))](
        *(boxes, starts, survives, num_boxes, threshold),
        BLOCK=BLOCK,
        num_warps=WARPS,
        num_stages=1,
        enable_fp_fusion=False,  # which would round the areas otherwise
    )
    return survives.view(torch.bool)

"""Triton kernels that match the candidates of all images with ground truths, the same values as `matching.assign`.

The first pass finds each candidate's best ground truth and each ground truth's largest IoU; the second one gives
candidates with that IoU to the ground truth. No matrix of IoUs is in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import on_its_device

BLOCK = 512
WARPS = 4


@triton.jit
def load_box(boxes, index, mask):
    x1 = tl.load(boxes + 4 * index, mask=mask, other=0.0)
    y1 = tl.load(boxes + 4 * index + 1, mask=mask, other=0.0)
    x2 = tl.load(boxes + 4 * index + 2, mask=mask, other=0.0)
    y2 = tl.load(boxes + 4 * index + 3, mask=mask, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def overlap(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Return the IoU as torchvision.ops.box_iou rounds it."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    shared = width * height
    areas = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)
    return tl.div_rn(shared, areas - shared)


@triton.jit(do_not_specialize=["image_stride", "num_candidates"])
def match_kernel(
    candidates, is_valid, gt_boxes, starts, best_of_gt, matches, image_stride, num_candidates,
    positive, negative, low_quality, IS_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store matches (images, num_candidates); the first pass also updates best_of_gt, the second one reads it."""
    image = tl.program_id(1).to(tl.int64)
    start, end = tl.load(starts + image), tl.load(starts + image + 1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = index < num_candidates
    x1, y1, x2, y2 = load_box(candidates + 4 * image * image_stride, index, ok)
    valid = tl.load(is_valid + image * num_candidates + index, mask=ok, other=0) != 0
    found = matches + image * num_candidates + index
    if IS_SECOND:
        match = tl.load(found, mask=ok, other=0)
    else:
        best, match = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.int64)
    for number in range(start, end):
        left, top, right, bottom = load_box(gt_boxes, number, True)
        shares = tl.where(valid, overlap(left, top, right, bottom, x1, y1, x2, y2), -1.0)
        if IS_SECOND:
            largest = tl.load(best_of_gt + number)
            needed = tl.where(largest >= low_quality, largest, 2.0)  # 2: none has it
            match = tl.where(shares == needed, (number - start).to(tl.int64), match)
        else:
            match = tl.where(shares > best, (number - start).to(tl.int64), match)
            best = tl.maximum(best, shares)
            tl.atomic_max(best_of_gt + number, tl.max(tl.maximum(shares, 0.0), axis=0), sem="relaxed")
    if not IS_SECOND:
        match = tl.where(best < positive, -2, match)  # UNUSED
        match = tl.where((best < negative) & valid, -1, match)  # NEGATIVE
    tl.store(found, match, mask=ok)


@on_its_device
def match_with_kernels(
    candidates: Tensor, is_valid: Tensor, gt_boxes: Tensor, starts: Tensor, thresholds: tuple[float, float, float]
) -> Tensor:
    """Return the matches of all images, (B, N) int64, as `matching.assign` does for each.

    Args:
        candidates: (N, 4) of all images, or (B, N, 4).
        is_valid: (B, N) bool.
        gt_boxes: (G, 4), image by image.
        starts: (B + 1,) int32, index of each image's first ground truth; the last entry is an end.
        thresholds: see `Thresholds`.
    """
    candidates, is_valid = candidates.contiguous(), is_valid.contiguous()
    num_images, num_candidates = is_valid.shape
    matches = torch.empty(is_valid.shape, dtype=torch.int64, device=is_valid.device)
    best_of_gt = torch.zeros(len(gt_boxes), device=is_valid.device)
    image_stride = 0 if candidates.dim() == 2 else num_candidates
    for is_second in (False, True):
        match_kernel[(triton.cdiv(num_candidates, BLOCK), num_images)](
            *(candidates, is_valid.view(torch.uint8), gt_boxes, starts, best_of_gt, matches),
            *(image_stride, num_candidates, *thresholds),
            IS_SECOND=is_second,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,  # which would round the areas otherwise
        )
    return matches

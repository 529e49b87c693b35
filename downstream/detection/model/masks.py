"""Masks as 28x28 pictures of boxes, and back onto the image (Mask R-CNN, arXiv 1703.06870)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

MASK_SIZE = 28
CHUNK_PIXELS = 2**26  # of pasted masks at a time; 256 MiB


def mask_goals(masks: Tensor, boxes: Tensor, gt_indices: Tensor) -> Tensor:
    """What the mask head should say of boxes (K, 4): the mean of mask gt_indices[k] of masks (G, H, W), 0 or 1, over
    each of 28x28 cells, cut at a half. (K, 28, 28) float32, 0 or 1.
    """
    height, width = masks.shape[1:]
    limits = boxes.new_tensor([width, height, width, height])
    regions = torch.cat((gt_indices[:, None].to(boxes), torch.minimum(boxes.clamp(min=0), limits)), dim=1)  # (K, 5)
    cells = roi_align(masks[:, None].float(), regions, MASK_SIZE, sampling_ratio=0, aligned=True)  # (K, 1, 28, 28)
    return (cells[:, 0] >= 0.5).float()


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks of a whole image, (D, height, width) bool, from probabilities (D, 28, 28) over boxes (D, 4).

    A pixel's probability is interpolated at its center, with 0 around the box; it belongs to the mask from 0.5 on. A
    box without area has an empty mask.
    """
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    chunk = max(1, CHUNK_PIXELS // max(1, height * width))
    if boxes.device.type == "cpu":
        chunk = 1  # and only the part of the image that the box covers
    for start in range(0, len(boxes), chunk):
        some = slice(start, start + chunk)
        top, bottom, left, right = 0, height, 0, width
        if chunk == 1:
            x1, y1, x2, y2 = boxes[start].tolist()
            left, right = max(0, int(x1) - 1), min(width, int(x2) + 2)
            top, bottom = max(0, int(y1) - 1), min(height, int(y2) + 2)
        x1, y1, x2, y2 = boxes[some].unbind(dim=1)
        xs = places_in_boxes(torch.arange(left, right, device=boxes.device), x1, x2)  # (D, W)
        ys = places_in_boxes(torch.arange(top, bottom, device=boxes.device), y1, y2)  # (D, H)
        grid = torch.stack(
            (
                xs[:, None].expand(-1, ys.shape[1], -1),
                ys[:, :, None].expand(-1, -1, xs.shape[1]),
            ),
            dim=-1,
        )  # (D, H, W, 2)
        pasted = F.grid_sample(probabilities[some, None].float(), grid, align_corners=False)  # (D, 1, H, W)
        has_area = (x2 > x1) & (y2 > y1)
        masks[some, top:bottom, left:right] = (pasted[:, 0] >= 0.5) & has_area[:, None, None]
    return masks


def places_in_boxes(pixels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Centers of pixels (W,) from -1 at a box's one side, low (D,), to 1 at the other, high (D,): (D, W)."""
    sides = (high - low).clamp(min=1e-6)[:, None]
    return (pixels + 0.5 - low[:, None]) / sides * 2 - 1

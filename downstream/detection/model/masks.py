"""Masks on a 28x28 grid per box, and pasted back onto the image (Mask R-CNN, arXiv 1703.06870)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from downstream.detection.model.boxes import limits_of
from downstream.detection.model.kernel_dispatch import kernel_works

MASK_SIZE = 28
CHUNK_PIXELS = 2**26  # pixels of masks that are pasted and encoded at a time; 256 MiB as float32


def mask_targets(masks: Tensor, boxes: Tensor, gt_indices: Tensor) -> Tensor:
    """Return the mask head's targets for boxes (K, 4): (K, 28, 28) float32, 0 or 1.

    A cell is 1 if the mean of the object's mask over it, masks[gt_indices[k]] of masks (G, H, W), is at least a half.
    """
    height, width = masks.shape[1:]
    (limits,) = limits_of([(height, width)], boxes.device)
    regions = torch.cat((gt_indices[:, None].to(boxes), torch.minimum(boxes.clamp(min=0), limits)), dim=1)  # (K, 5)
    cells = roi_align(masks[:, None].float(), regions, MASK_SIZE, sampling_ratio=0, aligned=True)  # (K, 1, 28, 28)
    return (cells[:, 0] >= 0.5).float()


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int, *, kernels: str = "torch") -> Tensor:
    """Return masks of the whole image, (D, height, width) bool, from probabilities (D, 28, 28) over boxes (D, 4).

    A pixel belongs to the mask if the probability interpolated at its center is at least 0.5; it is 0 outside the box.
    A box without area has an empty mask. `kernels` is MODEL.KERNELS.
    """
    if kernel_works(kernels, boxes, check_pasting):
        from downstream.detection.model.triton_masks import paste_with_kernel  # imports Triton

        return paste_with_kernel(probabilities, boxes, height, width)
    return paste_eagerly(probabilities, boxes, height, width)


def paste_eagerly(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return masks as `paste_masks` does."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    chunk = max(1, CHUNK_PIXELS // max(1, height * width))
    if boxes.device.type == "cpu":
        chunk = 1  # box by box, and only the part of the image that the box covers
    for start in range(0, len(boxes), chunk):
        some = slice(start, start + chunk)
        top, bottom, left, right = 0, height, 0, width
        if chunk == 1:
            x1, y1, x2, y2 = boxes[start].tolist()
            left, right = max(0, int(x1) - 1), min(width, int(x2) + 2)
            top, bottom = max(0, int(y1) - 1), min(height, int(y2) + 2)
        x1, y1, x2, y2 = boxes[some].unbind(dim=1)
        xs = positions_in_boxes(torch.arange(left, right, device=boxes.device), x1, x2)  # (D, W)
        ys = positions_in_boxes(torch.arange(top, bottom, device=boxes.device), y1, y2)  # (D, H)
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


def positions_in_boxes(pixels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return positions of pixel centers (W,) in boxes: (D, W), -1 at the side low (D,), 1 at high (D,)."""
    sides = (high - low).clamp(min=1e-6)[:, None]
    return (pixels + 0.5 - low[:, None]) / sides * 2 - 1


def check_pasting(device: torch.device) -> Tensor:
    """Return where the kernel's masks differ from PyTorch's; rounding may move one pixel in a thousand."""
    from downstream.detection.model.triton_masks import paste_with_kernel

    generator = torch.Generator().manual_seed(0)
    corners, sides = 30 * torch.rand(4, 2, generator=generator) - 10, 40 * torch.rand(4, 2, generator=generator)
    boxes, probabilities = torch.cat((corners, corners + sides), dim=1), torch.rand(4, 28, 28, generator=generator)
    found = paste_with_kernel(probabilities.to(device), boxes.to(device), 31, 45).cpu()
    is_wrong = found != paste_eagerly(probabilities, boxes, 31, 45)
    return is_wrong if is_wrong.sum() > is_wrong.numel() // 1000 else torch.zeros_like(is_wrong)

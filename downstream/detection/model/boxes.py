"""Anchors, and boxes encoded relative to them (Faster R-CNN, arXiv 1506.01497, equation 2); boxes are x1 y1 x2 y2."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from downstream.detection.model.structures import Size, constant, to_device

STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SCALE = 8  # side of a square anchor over the stride
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width
MAX_LOG_RATIO = abs(math.log(16 / 1000))  # a predicted side is at most 62.5 times its reference, and at least 1/62.5

RPN_STDS = (1.0, 1.0, 1.0, 1.0)
BOX_HEAD_STDS = (0.1, 0.1, 0.2, 0.2)


def make_anchors(grids: Sequence[Size], device: torch.device) -> list[Tensor]:
    """Return the anchors of each level, (H * W * 3, 4) for a grid (H, W): by row, column, then aspect ratio.

    Centers are multiples of the level's stride for any image size; nothing is rounded. Sides have the same bits on all
    devices: a GPU's square root may differ in the last one, and then anchors no longer tie for a ground truth.
    """
    ratios = torch.tensor(ASPECT_RATIOS, device="cpu")
    heights, widths = ratios.sqrt(), ratios.rsqrt()
    corners = constant(tuple((torch.stack((-widths, -heights, widths, heights)) / 2).flatten().tolist()), device)
    corners = corners.unflatten(0, (4, -1)).T  # (3, 4)
    levels = []
    for stride, (height, width) in zip(STRIDES, grids, strict=True):
        ys, xs = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        centers = torch.stack((xs, ys, xs, ys), dim=-1)  # (H, W, 4)
        levels.append((centers[:, :, None] + corners * (ANCHOR_SCALE * stride)).reshape(-1, 4))  # (H * W * 3, 4)
    return levels


def anchors_within(anchors: Tensor, padded: Sequence[Size]) -> Tensor:
    """Return which anchors (N, 4) are centered in each image's own padded size, (B, N) bool."""
    centers, _ = centers_and_sides(anchors)  # multiples of the strides, but for rounding
    limits = to_device([[width, height] for height, width in padded], anchors.device) - 0.5
    return (centers < limits[:, None]).all(dim=2)


def encode(references: Tensor, boxes: Tensor, stds: tuple[float, ...]) -> Tensor:
    """Return deltas (..., 4) from references to boxes, (..., 4) both: shifts over sides, logarithms of ratios."""
    centers, sides = centers_and_sides(references)
    box_centers, box_sides = centers_and_sides(boxes)
    deltas = torch.cat(((box_centers - centers) / sides, (box_sides / sides).log()), dim=-1)
    return deltas / constant(stds, deltas.device)


def decode(references: Tensor, deltas: Tensor, stds: tuple[float, ...], limits: Tensor | None = None) -> Tensor:
    """Return the boxes (..., 4) that deltas (..., 4) make of references (..., 4).

    Ratios of sides are clamped to 1 / 62.5 and 62.5.

    Args:
        limits: (..., 4), width, height, width, height: clip the boxes to that; None: do not clip.
    """
    centers, sides = centers_and_sides(references)
    shifts, logs = (deltas * constant(stds, deltas.device)).split(2, dim=-1)
    centers = centers + shifts * sides
    half = sides * logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    boxes = torch.cat((centers - half, centers + half), dim=-1)
    return boxes if limits is None else torch.minimum(boxes.clamp(min=0), limits)


def centers_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x, y) and (width, height) of boxes (..., 4), (..., 2) each."""
    low, high = boxes.split(2, dim=-1)
    return (low + high) / 2, high - low


def limits_of(sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Return sizes (height, width) of B images as (B, 4): width, height, width, height."""
    return to_device([[width, height, width, height] for height, width in sizes], device)

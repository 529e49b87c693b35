"""Inputs of the detector beside images, and its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from downstream.transforms import Size


class Frame(NamedTuple):
    """The sizes (height, width) of an image in a batch.

    Attributes:
        size: size of the image, in the batch's top left corner.
        padded: size with the padding that the image would have alone; the batch may be larger.
        original: size of the file; detections are in its pixels.
    """

    size: Size
    padded: Size
    original: Size


@dataclass
class Target:
    """The objects of an image, in the batch's pixels.

    Attributes:
        boxes: (G, 4) float32, x1 y1 x2 y2.
        labels: (G,) int64, from 0.
        masks: (G, H, W) uint8, 0 or 1; H and W are at least the image's.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def to(self, device: torch.device) -> "Target":
        return Target(*(x.to(device, non_blocking=True) for x in (self.boxes, self.labels, self.masks)))

    def pin_memory(self) -> "Target":
        return Target(self.boxes.pin_memory(), self.labels.pin_memory(), self.masks.pin_memory())


class Objects(NamedTuple):
    """The objects of all images of a batch, image by image, and a dummy at the end, so that indexing works without any.

    Attributes:
        boxes: (G + 1, 4).
        labels: (G + 1,).
        starts: (B + 1,) int32, index of each image's first object; the last entry is the dummy's.
        counts: objects of each image.
    """

    boxes: Tensor
    labels: Tensor
    starts: Tensor
    counts: list[int]

    def rows(self, gt_indices: Tensor) -> Tensor:
        """Return indices of boxes and labels from indices of an image's own objects: (B, K) both."""
        return self.starts[:-1, None] + gt_indices


def join_targets(targets: Sequence[Target]) -> Objects:
    device, counts = targets[0].boxes.device, [len(target.boxes) for target in targets]
    boxes = torch.cat([*(target.boxes for target in targets), constant(((0.0, 0.0, 1.0, 1.0),), device)])
    labels = torch.cat([*(target.labels for target in targets), targets[0].labels.new_zeros(1)])
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device, non_blocking=True)
    return Objects(boxes, labels, starts, counts)


class Detections(NamedTuple):
    """Detections in an image, best first, in pixels of the original file.

    Attributes:
        boxes: (D, 4), x1 y1 x2 y2.
        scores: (D,), from 0 to 1.
        labels: (D,) int64.
        mask_probabilities: (D, 28, 28), for each box's class, over the box; see `masks.paste_masks`.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_probabilities: Tensor

    def cpu(self) -> "Detections":
        return Detections(*(x.cpu() for x in self))


def to_device(values: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Return values as a float32 tensor on the device, without waiting for it, as `new_tensor` does."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


@cache
def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values of the code as a tensor on the device, the same one each time: a CUDA graph may read it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def rows(values: Tensor, indices: Tensor) -> Tensor:
    """Return rows indices[b, k] of values[b]: (B, K, D) from values (B, N, D) and indices (B, K)."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))

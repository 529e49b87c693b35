"""Random inputs for the detector, to measure its speed."""

from collections.abc import Callable

import torch
from torch import Tensor

from downstream.detection.data.transforms import padded_size
from downstream.detection.model.structures import Frame, Target

NUM_CLASSES = 80  # COCO's
NUM_OBJECTS = 7  # per image, the mean of COCO
ENOUGH_DETECTIONS, MAX_SHARPENINGS = 90, 8


def synthetic_inputs(
    batch_size: int, size: tuple[int, int], device: torch.device, num_classes: int = NUM_CLASSES
) -> tuple[Tensor, list[Frame], list[Target]]:
    """Return noise images (B, 3, H, W), padded, with boxes of all sizes that are full of mask."""
    height, width = padded_size(size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, height, width, generator=generator).to(device)
    targets = []
    for _ in range(batch_size):
        sides = 16 * 2 ** (4 * torch.rand(NUM_OBJECTS, 2, generator=generator)).clamp(max=min(size) / 20)
        corners = torch.rand(NUM_OBJECTS, 2, generator=generator) * (torch.tensor(size[::-1]) - sides).clamp(min=0)
        boxes = torch.cat((corners, corners + sides), dim=1)
        masks = torch.zeros(NUM_OBJECTS, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(num_classes, (NUM_OBJECTS,), generator=generator)
        targets.append(Target(boxes, labels, masks).to(device))
    frame = Frame(size, (height, width), size)
    return images.contiguous(memory_format=torch.channels_last), [frame] * batch_size, targets


def sharpen_until_busy(classifier_weight: Tensor, detect: Callable[[], int]) -> None:
    """Scale a newly initialized classifier, which detects nothing, until there is as much to do as after training.

    Args:
        classifier_weight: weight of the box classifier, doubled in place.
        detect: runs the detector and returns the number of detections per image.
    """
    for _ in range(MAX_SHARPENINGS):
        if detect() >= ENOUGH_DETECTIONS:
            return
        classifier_weight.mul_(2)

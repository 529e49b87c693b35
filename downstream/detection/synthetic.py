"""Random inputs and detections for the detector, to measure its speed."""

from typing import Any

import torch
from torch import Tensor, nn

from downstream.detection.data.transforms import padded_size
from downstream.detection.model.structures import Frame, Target

NUM_CLASSES = 80  # COCO's
NUM_OBJECTS = 7  # per image, the mean of COCO
NUM_CANDIDATES = 300  # per image, above the score threshold; of these, up to 100 become detections
SURE = 20.0  # a logit


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


class FixedDetections:
    """Forward hook of the box classifier, whose random weights would detect nothing, or something else in each model.

    NUM_CANDIDATES of an image's proposals are sure of a class each, the others of the background, for every model.

    Args:
        batch_size: number of images whose proposals (B * P,) the classifier gets together.
        background: index of the background's logit; classes follow each other from the index after it on.
    """

    def __init__(self, batch_size: int, background: int) -> None:
        self.batch_size = batch_size
        self.background = background

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:  # noqa: ARG002
        num_rows, num_logits = logits.shape
        count = min(NUM_CANDIDATES * self.batch_size, num_rows)
        chosen = torch.arange(count, device=logits.device) * num_rows // count
        labels = (self.background + 1 + torch.arange(count, device=logits.device) % (num_logits - 1)) % num_logits
        fixed, first = torch.zeros_like(logits).flatten(), chosen * num_logits  # first: index of a row's first logit
        fixed[self.background :: num_logits].fill_(SURE)
        fixed.index_fill_(0, first + self.background, 0.0)  # unlike an assignment, it can be in a CUDA graph
        return fixed.index_fill_(0, first + labels, SURE).view_as(logits)

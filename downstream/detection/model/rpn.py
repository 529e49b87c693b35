"""Region proposal network (Ren et al., arXiv 1506.01497) on the five maps of a feature pyramid."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.detection.model.boxes import (
    ASPECT_RATIOS,
    RPN_STDS,
    anchors_within,
    decode,
    encode,
    make_anchors,
)
from downstream.detection.model.matching import RPN_THRESHOLDS, assign_images, sample
from downstream.detection.model.nms import suppress_in_levels
from downstream.detection.model.structures import Frame, Objects, Size, constant, rows

NMS_THRESHOLD = 0.7
POSITIVE_FRACTION = 0.5


class Predictions(NamedTuple):
    """Outputs of the head for all N anchors, level by level.

    Attributes:
        logits: (B, N) float32.
        deltas: (B, N, 4) float32.
        anchors: (N, 4).
        grids: height and width of each level.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    grids: list[Size]


class Proposals(NamedTuple):
    """P slots for proposals in each of B images, best first; the last slots may be empty.

    Attributes:
        boxes: (B, P, 4).
        scores: (B, P), 0 in empty slots.
        is_valid: (B, P) bool.
    """

    boxes: Tensor
    scores: Tensor
    is_valid: Tensor


class RPNHead(nn.Module):
    """Region proposal network: scores and box deltas of three anchors at each position of each map.

    Args:
        width: channels of the maps.
        samples_per_image: anchors per image that the losses see.
        max_proposals: slots for proposals per image. Non-maximum suppression sees as many candidates of each level,
            twice as many in training.
        kernels: MODEL.KERNELS.
    """

    def __init__(self, width: int, *, samples_per_image: int, max_proposals: int, kernels: str = "torch") -> None:
        super().__init__()
        self.kernels = kernels
        self.samples_per_image = samples_per_image
        self.max_proposals = max_proposals
        self.rpn_conv = nn.Conv2d(width, width, 3, padding=1)
        self.rpn_cls = nn.Conv2d(width, len(ASPECT_RATIOS), 1)
        self.rpn_reg = nn.Conv2d(width, len(ASPECT_RATIOS) * 4, 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits (B, N) and deltas (B, N, 4), float32, for maps (B, width, H, W) at strides 4 to 64."""
        # Both outputs are one product, which reads a map once; tensor cores need a multiple of 8 columns.
        num_anchors, layers = len(ASPECT_RATIOS), (self.rpn_cls, self.rpn_reg)
        num_empty = -5 * num_anchors % 8 if maps[0].is_cuda else 0
        weight = F.pad(torch.cat([layer.weight.flatten(1) for layer in layers]), (0, 0, 0, num_empty))
        bias = F.pad(torch.cat([layer.bias for layer in layers]), (0, num_empty))  # type: ignore[misc]
        logits, deltas = [], []
        for x in maps:
            x = F.relu(self.rpn_conv(x)).permute(0, 2, 3, 1)  # (B, H, W, width)
            own_logits, own_deltas, _ = F.linear(x, weight, bias).split(
                (num_anchors, 4 * num_anchors, num_empty), dim=3
            )
            logits.append(own_logits.flatten(1).float())  # (B, H * W * 3)
            deltas.append(own_deltas.reshape(len(x), -1, 4).float())  # (B, H * W * 3, 4)
        return torch.cat(logits, 1), torch.cat(deltas, 1)

    def with_anchors(self, maps: Sequence[Tensor], logits: Tensor, deltas: Tensor) -> Predictions:
        """Return the outputs for maps with what they refer to."""
        grids = [(x.shape[2], x.shape[3]) for x in maps]
        return Predictions(logits, deltas, torch.cat(make_anchors(grids, maps[0].device)), grids)

    @torch.no_grad()
    def propose(self, predictions: Predictions, limits: Tensor) -> Proposals:
        """Return the best boxes of each image, after non-maximum suppression within each level.

        Args:
            predictions: for B images.
            limits: (B, 4), see `limits_of`.
        """
        limits = limits[:, None]
        lengths = [height * width * len(ASPECT_RATIOS) for height, width in predictions.grids]
        most = self.max_proposals * (2 if self.training else 1)
        counts = [min(most, length) for length in lengths]
        levels, chosen, start = [], [], 0
        for level, logits in enumerate(predictions.logits.split(lengths, dim=1)):
            indices = logits.topk(counts[level], dim=1).indices  # (B, K)
            chosen.append(indices + start)
            levels.append(torch.full_like(indices[0], level))
            start += lengths[level]
        indices = torch.cat(chosen, dim=1)  # (B, N)
        scores = predictions.logits.gather(1, indices).sigmoid()
        boxes = decode(predictions.anchors[indices], rows(predictions.deltas, indices), RPN_STDS, limits)  # (B, N, 4)
        # Levels side by side do not overlap.
        shift = torch.cat(levels)[:, None] * (limits + 1) * constant((1, 0, 1, 0), limits.device)  # (B, N, 4)
        is_kept = suppress_in_levels(boxes + shift, scores, counts, NMS_THRESHOLD, kernels=self.kernels)
        is_kept &= (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        best, slots = torch.where(is_kept, scores, -1).topk(min(self.max_proposals, scores.shape[1]), dim=1)  # (B, P)
        return Proposals(rows(boxes, slots), best.clamp(min=0), best >= 0)

    def losses(self, predictions: Predictions, frames: Sequence[Frame], objects: Objects) -> dict[str, Tensor]:
        """Return binary cross-entropy and L1 loss: sums over the batch, divided by the number of sampled anchors."""
        anchors = predictions.anchors
        is_valid = anchors_within(anchors, [frame.padded for frame in frames])  # (B, N)
        matches = assign_images(anchors, is_valid, objects, RPN_THRESHOLDS, kernels=self.kernels)
        indices, gt_indices, is_positive, is_used = sample(matches, self.samples_per_image, POSITIVE_FRACTION)  # (B, K)
        targets = encode(anchors[indices], objects.boxes[objects.rows(gt_indices)], RPN_STDS)  # (B, K, 4)
        total = is_used.sum().clamp(min=1)
        errors = F.binary_cross_entropy_with_logits(
            predictions.logits.gather(1, indices), is_positive.float(), reduction="none"
        )
        distances = (rows(predictions.deltas, indices) - targets).abs()  # (B, K, 4)
        return {
            "loss_rpn_cls": torch.where(is_used, errors, 0).sum() / total,
            "loss_rpn_bbox": torch.where(is_positive[..., None], distances, 0).sum() / total,
        }

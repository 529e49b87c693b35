"""Mask R-CNN (He et al., arXiv 1703.06870) with a feature pyramid, on any backbone with four maps."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from downstream.detection.model.fpn import FPN
from downstream.detection.model.roi_heads import RoIHead
from downstream.detection.model.rpn import RPNHead
from downstream.detection.model.structures import Detections, Frame, Target


class MaskRCNN(nn.Module):
    """Mask R-CNN with the module names of the published MLLA detectors.

    Args:
        backbone: module from images (B, 3, H, W) to maps (B, widths[i], H / s, W / s) at strides s = 4, 8, 16, 32.
        num_classes: number of classes without the background.
        width: channels of the pyramid's maps.
        hidden: width of the box head.
        rpn_samples: anchors per image that the losses see.
        roi_samples: proposals per image that the losses see.
        max_proposals: slots for proposals per image.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 80,
        *,
        width: int = 256,
        hidden: int = 1024,
        rpn_samples: int = 256,
        roi_samples: int = 512,
        max_proposals: int = 1000,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = FPN(backbone.widths, width)  # type: ignore[arg-type]
        self.rpn_head = RPNHead(width, samples_per_image=rpn_samples, max_proposals=max_proposals)
        self.roi_head = RoIHead(num_classes, width, hidden=hidden, samples_per_image=roi_samples)

    def forward(self, images: Tensor, frames: Sequence[Frame], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the five losses, scalars, of images (B, 3, H, W), normalized; H and W are multiples of 32."""
        maps = self.neck(self.backbone(images))
        predictions = self.rpn_head(maps)
        losses = self.rpn_head.losses(predictions, frames, targets)
        proposals = self.rpn_head.propose(predictions, frames)
        return {**losses, **self.roi_head.losses(maps, proposals, targets)}

    @torch.no_grad()
    def detect(self, images: Tensor, frames: Sequence[Frame]) -> list[Detections]:
        """Return the detections in each of images (B, 3, H, W), normalized; the model must be in evaluation mode."""
        maps = self.neck(self.backbone(images))
        proposals = self.rpn_head.propose(self.rpn_head(maps), frames)
        return self.roi_head.detect(maps, proposals, frames)

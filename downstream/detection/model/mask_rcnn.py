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
        kernels: MODEL.KERNELS, for proposals and regions.
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
        kernels: str = "torch",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = FPN(backbone.widths, width)  # type: ignore[arg-type]
        self.rpn_head = RPNHead(width, samples_per_image=rpn_samples, max_proposals=max_proposals, kernels=kernels)
        self.roi_head = RoIHead(num_classes, width, hidden=hidden, samples_per_image=roi_samples, kernels=kernels)

    def forward(self, images: Tensor, frames: Sequence[Frame], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the five losses, scalars, of images (B, 3, H, W), normalized; H and W are multiples of 32."""
        return self.losses(self.features(images), frames, targets)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what depends on the images alone: five maps, then logits and deltas of the RPN."""
        maps = self.neck(self.backbone(images))
        return (*maps, *self.rpn_head(maps))

    def feature_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of `features`."""
        return [parameter for part in (self.backbone, self.neck, self.rpn_head) for parameter in part.parameters()]

    def losses(
        self, features: Sequence[Tensor], frames: Sequence[Frame], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Return the five losses, scalars, from the result of `features`."""
        *maps, logits, deltas = features
        predictions = self.rpn_head.with_anchors(maps, logits, deltas)
        losses = self.rpn_head.losses(predictions, frames, targets)
        proposals = self.rpn_head.propose(predictions, frames)
        return {**losses, **self.roi_head.losses(maps, proposals, targets)}

    @torch.no_grad()
    def detect(self, images: Tensor, frames: Sequence[Frame]) -> list[Detections]:
        """Return the detections in each of images (B, 3, H, W), normalized; the model must be in evaluation mode."""
        *maps, logits, deltas = self.features(images)
        proposals = self.rpn_head.propose(self.rpn_head.with_anchors(maps, logits, deltas), frames)
        return self.roi_head.detect(maps, proposals, frames)

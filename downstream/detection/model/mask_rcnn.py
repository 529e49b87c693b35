"""Mask R-CNN (He et al., arXiv 1703.06870) with a feature pyramid, on any backbone with four maps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from downstream.detection.model.boxes import limits_of
from downstream.detection.model.fpn import FPN
from downstream.detection.model.nms import waits_for_device
from downstream.detection.model.roi_heads import RoIHead
from downstream.detection.model.rpn import RPNHead
from downstream.detection.model.structures import Detections, Frame, Target, join_targets

Function = Callable[..., tuple[Tensor, ...]]


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
        kernels: MODEL.KERNELS, for all but the backbone.
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
        self.neck = FPN(backbone.widths, width, kernels=kernels)  # type: ignore[arg-type]
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
        objects = join_targets(targets)
        losses = self.rpn_head.losses(predictions, frames, objects)
        proposals = self.rpn_head.propose(predictions, limits_of([f.size for f in frames], logits.device))
        return {**losses, **self.roi_head.losses(maps, proposals, objects, [target.masks for target in targets])}

    def score_regions(self, images: Tensor, limits: Tensor) -> tuple[Tensor, ...]:
        """Return maps, boxes (B, P, classes, 4) and scores (B, P, classes), all of fixed shapes.

        Args:
            images: (B, 3, H, W), normalized.
            limits: (B, 4), see `limits_of`.
        """
        *maps, logits, deltas = self.features(images)
        proposals = self.rpn_head.propose(self.rpn_head.with_anchors(maps, logits, deltas), limits)
        return (*maps, *self.roi_head.classify(maps, proposals, limits))

    @torch.no_grad()
    def detect(self, images: Tensor, frames: Sequence[Frame]) -> list[Detections]:
        """Return the detections in each of images (B, 3, H, W), normalized; the model must be in evaluation mode."""
        limits = limits_of([frame.size for frame in frames], images.device)
        *maps, boxes, scores = self.score_regions(images, limits)
        scales = limits / limits_of([frame.original for frame in frames], images.device)
        return self.roi_head.detect(maps, boxes, scores, scales)

    def record_inference(self, make: Callable[[Function], Function]) -> None:
        """Replace what `detect` computes in fixed shapes by what `make` makes of it; CUDA graphs may take its place.

        That is all but suppression of detections, and of proposals where it waits for the device.
        """
        head = self.roi_head
        if waits_for_device(self.rpn_head.kernels, next(self.parameters())):
            self.features = make(self.features)  # type: ignore[method-assign]
        else:
            self.score_regions = make(self.score_regions)  # type: ignore[method-assign]
        head.predict_masks, head.has_fixed_slots = make(head.predict_masks), True  # type: ignore[method-assign, assignment]

"""Second stage of Mask R-CNN (arXiv 1703.06870): class, box and mask of each proposal."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from downstream.detection.model.boxes import BOX_HEAD_STDS, decode, encode
from downstream.detection.model.fpn import NamedConv
from downstream.detection.model.masks import MASK_SIZE, mask_targets
from downstream.detection.model.matching import ROI_THRESHOLDS, UNUSED, Sample, assign_images, sample
from downstream.detection.model.pooling import STRIDES, pool_regions
from downstream.detection.model.rpn import Proposals
from downstream.detection.model.structures import Detections, Objects, rows

BOX_GRID, MASK_GRID = 7, 14
POSITIVE_FRACTION = 0.25
SCORE_THRESHOLD = 0.05
NMS_THRESHOLD = 0.5
MAX_DETECTIONS = 100


class BoxHead(nn.Module):
    """Box head: regions (R, width, 7, 7) to logits (R, classes + 1), background last, and deltas (R, classes, 4)."""

    def __init__(self, num_classes: int, width: int, hidden: int) -> None:
        super().__init__()
        layers = nn.Linear(width * BOX_GRID**2, hidden), nn.Linear(hidden, hidden)
        self.shared_fcs = nn.ModuleList(layers)
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, num_classes * 4)
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in (*layers, self.fc_cls, self.fc_reg):
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.shared_fcs
        if regions.is_contiguous():
            x = first(regions.flatten(1))  # (R, hidden)
        else:  # channels_last: the weight is smaller than the regions, which stay as they are
            weight = first.weight.unflatten(1, regions.shape[1:]).permute(0, 2, 3, 1).flatten(1)  # type: ignore[operator]
            x = F.linear(regions.permute(0, 2, 3, 1).flatten(1), weight, first.bias)  # type: ignore[arg-type]
        x = F.relu(second(F.relu(x)))
        return self.fc_cls(x).float(), self.fc_reg(x).float().unflatten(1, (-1, 4))  # (R, classes, 4)


class MaskHead(nn.Module):
    """Mask head from regions (R, width, 14, 14) to logits (R, classes, 28, 28), float32."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(4)]
        self.convs = nn.ModuleList(map(NamedConv, convs))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.conv_logits = nn.Conv2d(width, num_classes, 1)
        for layer in (*convs, self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, regions: Tensor) -> Tensor:
        x = regions.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.conv_logits(F.relu(self.upsample(x))).float()


class RoIHead(nn.Module):
    """Box head and mask head, with their losses and detections.

    Attributes:
        has_fixed_slots: `predict_masks` always gets as many regions as an image can have detections.

    Args:
        num_classes: number of classes without the background.
        width: channels of the maps.
        hidden: width of the box head.
        samples_per_image: proposals per image that the losses see.
        kernels: MODEL.KERNELS.
    """

    def __init__(
        self, num_classes: int, width: int, *, hidden: int, samples_per_image: int, kernels: str = "torch"
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.has_fixed_slots = False
        self.num_classes = num_classes
        self.samples_per_image = samples_per_image
        self.bbox_head = BoxHead(num_classes, width, hidden)
        self.mask_head = MaskHead(num_classes, width)

    def losses(
        self, maps: Sequence[Tensor], proposals: Proposals, objects: Objects, masks: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return cross-entropy and L1 loss per sampled proposal, and cross-entropy of the positives' masks.

        Args:
            maps: of the pyramid.
            proposals: of B images.
            objects: the images' objects.
            masks: of each image's objects, (G, H, W).
        """
        boxes, chosen = self.sample_regions(proposals, objects)  # (B, K, 4)
        is_positive, is_used = chosen.is_positive.flatten(), chosen.is_used.flatten()  # (B * K,)
        matched = objects.rows(chosen.gt_indices).flatten()
        classes = torch.where(is_positive, objects.labels[matched], self.num_classes)
        box_targets = encode(boxes.flatten(0, 1), objects.boxes[matched], BOX_HEAD_STDS)  # (B * K, 4)

        images = image_indices(boxes)
        logits, deltas = self.bbox_head(pool_regions(maps, boxes.flatten(0, 1), images, BOX_GRID, kernels=self.kernels))
        total = is_used.sum().clamp(min=1)
        errors = F.cross_entropy(logits, classes, reduction="none")
        own_deltas = rows(deltas, torch.where(is_positive, classes, 0)[:, None])[:, 0]  # (B * K, 4)
        distances = (own_deltas - box_targets).abs()
        return {
            "loss_cls": torch.where(is_used, errors, 0).sum() / total,
            "loss_bbox": torch.where(is_positive[:, None], distances, 0).sum() / total,
            "loss_mask": self.mask_loss(maps, boxes, chosen, classes, masks),
        }

    @torch.no_grad()
    def sample_regions(self, proposals: Proposals, objects: Objects) -> tuple[Tensor, Sample]:
        """Return boxes (B, K, 4) sampled from ground truths and proposals, and their matches, (B, K) each."""
        starts = objects.starts[:, None]  # (B + 1, 1)
        # As many slots for ground truths as the fullest image needs: all images have equally many candidates.
        numbers = torch.arange(max(objects.counts), device=starts.device)
        is_own = numbers < starts[1:] - starts[:-1]  # (B, most)
        own_boxes = objects.boxes[torch.where(is_own, starts[:-1] + numbers, 0)] * is_own[..., None]  # (B, most, 4)
        matches = assign_images(
            proposals.boxes, proposals.is_valid, objects, ROI_THRESHOLDS, kernels=self.kernels
        )  # (B, P)
        matches = torch.cat((torch.where(is_own, numbers, UNUSED), matches), dim=1)  # (B, most + P)
        chosen = sample(matches, self.samples_per_image, POSITIVE_FRACTION)
        return rows(torch.cat((own_boxes, proposals.boxes), dim=1), chosen.indices), chosen

    def mask_loss(
        self, maps: Sequence[Tensor], boxes: Tensor, chosen: Sample, classes: Tensor, masks: Sequence[Tensor]
    ) -> Tensor:
        """Return the mean binary cross-entropy of the positives' masks, on the channel of their class; 0 without any.

        The only host sync of the losses, to count the positives: the head is too costly for empty slots.
        """
        slots = boxes.shape[1]
        expected = self.expected_masks(boxes, chosen, masks)  # before the host waits, so that the device has work
        counts = chosen.is_positive.sum(dim=1).tolist()  # positives come first
        is_empty = not sum(counts)
        if is_empty:
            counts[0] = 1  # the head must run, so that its parameters get a gradient
        places = torch.cat([torch.arange(n) + image * slots for image, n in enumerate(counts)])
        places = places.to(boxes.device, non_blocking=True)  # (R,), of B * K
        regions, images = boxes.flatten(0, 1)[places], image_indices(boxes)[places]
        logits = self.mask_head(pool_regions(maps, regions, images, MASK_GRID, kernels=self.kernels))
        if is_empty:
            return logits.sum() * 0
        own_logits = logits[torch.arange(len(places), device=boxes.device), classes[places]]  # (R, 28, 28)
        return F.binary_cross_entropy_with_logits(own_logits, expected[images, places % slots])

    @torch.no_grad()
    def expected_masks(self, boxes: Tensor, chosen: Sample, masks: Sequence[Tensor]) -> Tensor:
        """Return the mask head's targets for as many slots as may be positive: (B, slots, 28, 28), 0 for negatives."""
        most = min(int(self.samples_per_image * POSITIVE_FRACTION), boxes.shape[1])
        boxes = torch.where(chosen.is_positive[..., None], boxes, 0)[:, :most]  # without area, which costs nothing
        parts = zip(masks, boxes, chosen.gt_indices[:, :most], strict=True)
        return torch.stack(
            [mask_targets(*part) if len(part[0]) else boxes.new_zeros(most, MASK_SIZE, MASK_SIZE) for part in parts]
        )

    def classify(self, maps: Sequence[Tensor], proposals: Proposals, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes (B, P, classes, 4), within `limits` (B, 4), and scores (B, P, classes), 0 in empty slots."""
        num_images, slots = proposals.is_valid.shape
        images = image_indices(proposals.boxes)
        regions = pool_regions(maps, proposals.boxes.flatten(0, 1), images, BOX_GRID, kernels=self.kernels)
        logits, deltas = self.bbox_head(regions)
        scores = logits.softmax(dim=1)[:, :-1].unflatten(0, (num_images, slots))  # (B, P, classes)
        deltas = deltas.unflatten(0, (num_images, slots))  # (B, P, classes, 4)
        boxes = decode(proposals.boxes[:, :, None], deltas, BOX_HEAD_STDS, limits[:, None, None])
        return boxes, scores * proposals.is_valid[..., None]

    def predict_masks(self, regions: Tensor, images: Tensor, labels: Tensor, *maps: Tensor) -> tuple[Tensor]:
        """Return probabilities (D, 28, 28) of the masks of labels (D,) in regions (D, 4) of images (D,)."""
        logits = self.mask_head(pool_regions(maps, regions, images, MASK_GRID, kernels=self.kernels))
        return (logits[torch.arange(len(labels), device=labels.device), labels].sigmoid(),)

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], boxes: Tensor, scores: Tensor, scales: Tensor) -> list[Detections]:
        """Return the detections in each image, in pixels of its file.

        Args:
            maps: of the pyramid.
            boxes: (B, P, classes, 4), in pixels of the batch.
            scores: (B, P, classes).
            scales: (B, 4), pixels of the batch per pixel of the file.
        """
        num_images = len(boxes)
        best = [
            best_of_image(own_boxes, own_scores)
            for own_boxes, own_scores in zip(boxes / scales[:, None, None], scores, strict=True)
        ]
        counts = [len(own) for _, own, _ in best]
        images = torch.arange(num_images).repeat_interleave(torch.tensor(counts)).to(boxes.device, non_blocking=True)
        regions = torch.cat([own for own, _, _ in best]) * scales[images]
        labels = torch.cat([own for _, _, own in best])
        num_empty = num_images * MAX_DETECTIONS - len(labels) if self.has_fixed_slots else 0
        inputs = F.pad(regions, (0, 0, 0, num_empty)), F.pad(images, (0, num_empty)), F.pad(labels, (0, num_empty))
        (probabilities,) = self.predict_masks(*inputs, *maps[: len(STRIDES)])  # (D, 28, 28)
        masks = probabilities[: len(labels)].clone().split(counts)  # the next call may write there
        return [Detections(*own, mask) for own, mask in zip(best, masks, strict=True)]


def image_indices(boxes: Tensor) -> Tensor:
    """Return the index of the image for each of boxes (B, K, 4): (B * K,)."""
    return torch.arange(len(boxes), device=boxes.device)[:, None].expand(-1, boxes.shape[1]).flatten()


def best_of_image(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (D, 4), scores (D,) and labels (D,), best first, from boxes (P, classes, 4), scores (P, classes).

    These are the boxes above the score threshold that survive non-maximum suppression within their class.
    """
    slots, labels = (scores > SCORE_THRESHOLD).nonzero(as_tuple=True)
    boxes, scores = boxes[slots, labels], scores[slots, labels]
    kept = batched_nms(boxes, scores, labels, NMS_THRESHOLD)[:MAX_DETECTIONS]
    return boxes[kept], scores[kept], labels[kept]

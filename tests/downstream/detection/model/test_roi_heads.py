import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms, roi_align

from downstream.detection.model.boxes import RPN_STDS, decode, limits_of
from downstream.detection.model.pooling import STRIDES, pool_regions
from downstream.detection.model.roi_heads import SCORE_THRESHOLD, BoxHead, RoIHead, best_of_image
from downstream.detection.model.rpn import Predictions, Proposals, RPNHead
from downstream.detection.model.structures import Frame, Target, join_targets


def slow_pool(maps: list[Tensor], box: Tensor, image: int, grid: int) -> Tensor:
    """The one map of the box's size: up to 112 pixels (square) the first, up to 224 the second, and so on."""
    side = ((box[2] - box[0]) * (box[3] - box[1])).item() ** 0.5
    level = sum(side >= limit - 1e-3 for limit in (112, 224, 448))
    return roi_align(maps[level][image : image + 1], [box[None]], grid, 1 / STRIDES[level], 0, True)[0]


def test_pooling_against_one_box_at_a_time() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 512 // s, 640 // s, requires_grad=True) for s in (*STRIDES, 64)]
    sides = torch.tensor([3.0, 55, 56, 111, 112, 113, 223, 224, 447, 448, 500, 0])
    boxes = torch.cat((torch.full((12, 2), 10.0), 10 + sides[:, None].expand(12, 2)), dim=1)
    images = torch.arange(12) % 2
    pooled = pool_regions(maps, boxes, images, 7)
    slow = torch.stack([slow_pool(maps, box, int(image), 7) for box, image in zip(boxes, images, strict=True)])
    torch.testing.assert_close(pooled, slow)
    (gradient,) = torch.autograd.grad(pooled.square().sum(), maps[0], retain_graph=True)
    (expected,) = torch.autograd.grad(slow.square().sum(), maps[0])
    torch.testing.assert_close(gradient, expected)


def test_box_head_reads_regions_of_either_layout() -> None:
    torch.manual_seed(0)
    head, regions = BoxHead(3, 8, 16), torch.randn(5, 8, 7, 7)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = regions.contiguous(memory_format=layout).requires_grad_()
        logits, deltas = head(x)
        gradients.append(torch.autograd.grad(logits.square().sum() + deltas.square().sum(), [x, *head.parameters()]))
    torch.testing.assert_close(*gradients)


def test_suppression_is_within_a_class_and_keeps_the_best_hundred() -> None:
    torch.manual_seed(0)
    corners = torch.rand(200, 3, 2) * 60
    boxes = torch.cat((corners, corners + 10 + torch.rand(200, 3, 2) * 30), dim=-1)
    scores = torch.rand(200, 3) * 0.4
    expected = []
    for label in range(3):
        mine = scores[:, label] > SCORE_THRESHOLD
        kept = nms(boxes[mine, label], scores[mine, label], 0.5)
        expected += [(float(s), label) for s in scores[mine, label][kept]]
    found_boxes, found_scores, found_labels = best_of_image(boxes, scores)
    assert [round(float(s), 6) for s in found_scores] == [round(s, 6) for s, _ in sorted(expected, reverse=True)][:100]
    assert len(found_boxes) == min(100, len(expected))
    for label in range(3):
        overlaps = box_iou(found_boxes[found_labels == label], found_boxes[found_labels == label])
        assert overlaps.fill_diagonal_(0).max() <= 0.5


def test_empty_slots_get_no_gradient() -> None:
    """Proposals that are not there, of no size, whose shift to a ground truth around the same point is 0 / 0."""
    head = RoIHead(3, 8, hidden=16, samples_per_image=16)
    proposals = Proposals(torch.zeros(1, 20, 4), torch.zeros(1, 20), torch.zeros(1, 20, dtype=torch.bool))
    target = Target(torch.tensor([[-5.0, -5.0, 5.0, 5.0]]), torch.tensor([1]), torch.ones(1, 64, 64, dtype=torch.uint8))
    maps = [torch.randn(1, 8, 64 // s, 64 // s) for s in STRIDES]
    losses = head.losses(maps, proposals, join_targets([target]), [target.masks])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("is_training", [True, False])
def test_proposals_against_one_level_at_a_time(is_training: bool) -> None:
    """Best of each level, suppression in each level alone, best of all, empty boxes last."""
    torch.manual_seed(0)
    head = RPNHead(8, samples_per_image=16, max_proposals=120).train(is_training)
    for conv in (head.rpn_conv, head.rpn_cls, head.rpn_reg):
        torch.nn.init.normal_(conv.weight, std=0.3)
    maps = [torch.randn(2, 8, -(-96 // s), -(-160 // s)) for s in (4, 8, 16, 32, 64)]
    frames = [Frame((96, 160), (96, 160), (96, 160)), Frame((70, 90), (96, 96), (70, 90))]
    with torch.no_grad():
        predictions: Predictions = head.with_anchors(maps, *head(maps))
    proposals = head.propose(predictions, limits_of([frame.size for frame in frames], torch.device("cpu")))
    lengths = [h * w * 3 for h, w in predictions.grids]
    for image, frame in enumerate(frames):
        rows = []
        limits = limits_of([frame.size], torch.device("cpu"))
        parts = [x.split(lengths) for x in (predictions.logits[image], predictions.deltas[image], predictions.anchors)]
        for logits, deltas, anchors in zip(*parts, strict=True):
            order = logits.argsort(descending=True)[: 240 if is_training else 120]
            boxes = decode(anchors[order], deltas[order], RPN_STDS, limits)
            kept = nms(boxes, logits[order].sigmoid(), 0.7)
            rows += [(float(logits[order][k].sigmoid()), boxes[k]) for k in kept]
        rows = [(score, box) for score, box in rows if (box[2:] > box[:2]).all()]
        rows = sorted(rows, key=lambda row: -row[0])[:120]
        assert int(proposals.is_valid[image].sum()) == len(rows)
        torch.testing.assert_close(proposals.boxes[image, : len(rows)], torch.stack([box for _, box in rows]))
        torch.testing.assert_close(proposals.scores[image, : len(rows)], torch.tensor([score for score, _ in rows]))

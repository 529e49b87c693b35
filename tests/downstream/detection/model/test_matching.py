import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from downstream.detection.model.matching import (
    NEGATIVE,
    ROI_THRESHOLDS,
    RPN_THRESHOLDS,
    UNUSED,
    Thresholds,
    assign,
    assign_images,
    sample,
)
from downstream.detection.model.structures import Target, join_targets


def slow_assign(candidates: Tensor, is_valid: Tensor, gt_boxes: Tensor, thresholds: Thresholds) -> list[int]:
    """One candidate, then one ground truth, after the other."""
    matches = []
    for candidate, valid in zip(candidates, is_valid, strict=True):
        overlaps = [float(box_iou(gt[None], candidate[None])) for gt in gt_boxes]
        best = max(overlaps, default=0.0)
        if not valid:
            matches.append(UNUSED)
        elif best >= thresholds.positive:
            matches.append(overlaps.index(best))
        else:
            matches.append(NEGATIVE if best < thresholds.negative else UNUSED)
    for number, gt in enumerate(gt_boxes):
        overlaps = [float(box_iou(gt[None], c[None])) if v else -1.0 for c, v in zip(candidates, is_valid, strict=True)]
        if max(overlaps) >= thresholds.low_quality:
            for i, overlap in enumerate(overlaps):
                if overlap == max(overlaps):
                    matches[i] = number
    return matches


@pytest.mark.parametrize("thresholds", [RPN_THRESHOLDS, ROI_THRESHOLDS])
@pytest.mark.parametrize("num_gts", [0, 1, 7])
def test_assignment_matches_a_loop(thresholds: Thresholds, num_gts: int) -> None:
    torch.manual_seed(num_gts)
    corners = torch.randint(0, 40, (150, 2)).float()
    candidates = torch.cat((corners, corners + torch.randint(5, 25, (150, 2))), dim=1)
    candidates = torch.cat((candidates, candidates[:40]))  # ties
    is_valid = torch.rand(190) < 0.8
    gt_boxes = candidates[5 : 5 + num_gts] + torch.randint(-3, 4, (num_gts, 4))
    matches = assign(candidates, is_valid, gt_boxes, thresholds)
    assert matches.tolist() == slow_assign(candidates, is_valid, gt_boxes, thresholds)
    assert num_gts == 0 or (matches >= 0).any()


def test_images_are_matched_and_sampled_as_one_by_one() -> None:
    """From anchors of all images, or candidates of each; with the same random numbers."""
    torch.manual_seed(0)
    corners = torch.randint(0, 40, (3, 150, 2)).float()
    candidates = torch.cat((corners, corners + torch.randint(5, 25, (3, 150, 2))), dim=2)
    is_valid = torch.rand(3, 150) < 0.8
    targets = [Target(candidates[0, :n] + 2, torch.zeros(n), torch.zeros(n, 1, 1)) for n in (4, 0, 2)]
    for own in (candidates, candidates[0]):
        matches = assign_images(own, is_valid, join_targets(targets), RPN_THRESHOLDS)
        torch.manual_seed(1)
        together = sample(matches, 30, 0.25)
        torch.manual_seed(1)
        for image in range(3):
            boxes_of_image = own if own.dim() == 2 else own[image]
            expected = assign(boxes_of_image, is_valid[image], targets[image].boxes, RPN_THRESHOLDS)
            assert matches[image].equal(expected)
            assert all(x[image].equal(one) for x, one in zip(together, sample(expected, 30, 0.25), strict=True))


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows).float()


def test_a_poorly_covered_ground_truth_gets_its_best_candidates() -> None:
    """IoU 0.4 with two equal candidates: below 0.7, yet both are its own; one of IoU 0.32 stays unused."""
    gt, candidates = boxes((0, 0, 10, 10)), boxes((0, 0, 10, 4), (0, 6, 10, 10), (0, 0, 10, 3.2), (20, 20, 30, 30))
    assert assign(candidates, torch.ones(4) > 0, gt, RPN_THRESHOLDS).tolist() == [0, 0, UNUSED, NEGATIVE]


def test_thresholds_are_inclusive() -> None:
    """IoU of exactly 0.5 is positive for proposals; beside a better candidate, so that no rescue is needed."""
    gt, candidates = boxes((0, 0, 8, 8)), boxes((0, 0, 8, 8), (0, 0, 8, 4), (0, 0, 8, 3.9))
    assert assign(candidates, torch.ones(3) > 0, gt, ROI_THRESHOLDS).tolist() == [0, 0, NEGATIVE]


def test_the_later_ground_truth_takes_a_shared_best_candidate() -> None:
    """Even from one that it covers better: IoU 0.9 with the first, 0.4 with the second, which has no other."""
    candidates, gts = boxes((0, 0, 10, 10)), boxes((0, 0, 10, 9), (0, 6, 10, 10))
    assert assign(candidates, torch.ones(1) > 0, gts, RPN_THRESHOLDS).tolist() == [1]


def test_a_tiny_ground_truth_gets_nothing() -> None:
    """IoU 0.01 at best is no reason to call a background anchor positive."""
    assert assign(boxes((0, 0, 10, 10)), torch.ones(1) > 0, boxes((4, 4, 5, 5)), RPN_THRESHOLDS).tolist() == [NEGATIVE]


def check_sample(matches: Tensor, count: int, fraction: float) -> tuple[int, int]:
    """Check all that must hold; the numbers of positives and negatives."""
    chosen = sample(matches, count, fraction)
    used = chosen.indices[chosen.is_used]
    assert len(chosen.indices) == min(count, len(matches))
    assert len(set(used.tolist())) == len(used)
    num_positives = int(chosen.is_positive.sum())
    assert chosen.is_positive[:num_positives].all(), "positives come first"
    assert (matches[chosen.indices[:num_positives]] >= 0).all()
    assert chosen.gt_indices[:num_positives].tolist() == matches[chosen.indices[:num_positives]].tolist()
    assert (matches[used[num_positives:]] == NEGATIVE).all()
    return num_positives, len(used) - num_positives


@pytest.mark.parametrize(
    ("positives", "negatives", "unused", "count", "expected"),
    [
        (100, 500, 50, 64, (16, 48)),  # more than enough of both
        (5, 500, 50, 64, (5, 59)),  # few positives: negatives fill up
        (100, 10, 50, 64, (16, 10)),  # few negatives: places stay empty
        (0, 500, 0, 64, (0, 64)),
        (3, 7, 5, 64, (3, 7)),  # fewer candidates than places
        (0, 0, 80, 64, (0, 0)),
        (200, 300, 10, 10**9, (200, 300)),  # all of them
    ],
)
def test_numbers_of_sampled_positives_and_negatives(
    positives: int, negatives: int, unused: int, count: int, expected: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    matches = torch.cat(
        (torch.arange(positives) % 4, torch.full((negatives,), NEGATIVE), torch.full((unused,), UNUSED))
    )
    assert check_sample(matches[torch.randperm(len(matches))], count, 0.25) == expected


def test_sampling_is_even_and_follows_the_seed() -> None:
    matches = torch.cat((torch.zeros(20, dtype=torch.int64), torch.full((40,), NEGATIVE)))
    counts = torch.zeros(60)
    torch.manual_seed(0)
    for _ in range(400):
        chosen = sample(matches, 20, 0.5)
        counts[chosen.indices] += 1
    assert (counts[:20] / 400 - 10 / 20).abs().max() < 0.12  # standard deviation 0.025
    assert (counts[20:] / 400 - 10 / 40).abs().max() < 0.11
    torch.manual_seed(5)
    one = sample(matches, 20, 0.5)
    torch.manual_seed(5)
    assert torch.equal(one.indices, sample(matches, 20, 0.5).indices)

"""Matching of all images' candidates with ground truths: equal to PyTorch's, one image at a time."""

import pytest
import torch

from downstream.detection.model.matching import ROI_THRESHOLDS, RPN_THRESHOLDS, Thresholds, assign_images
from downstream.detection.model.structures import Target, join_targets


@pytest.mark.parametrize("thresholds", [RPN_THRESHOLDS, ROI_THRESHOLDS])
@pytest.mark.parametrize("is_shared", [True, False])
def test_matches_are_those_of_pytorch(device: torch.device, thresholds: Thresholds, is_shared: bool) -> None:
    """With ties, thresholds that are met exactly, images without objects, and boxes without area."""
    torch.manual_seed(0)
    corners = torch.randint(0, 40, (3, 700, 2)).float()
    candidates = torch.cat((corners, corners + torch.randint(1, 25, (3, 700, 2))), dim=2)
    candidates[:, 600:] = candidates[:, :100]
    is_valid = torch.rand(3, 700) < 0.8
    boxes = [candidates[i, :n] + torch.randint(-3, 4, (n, 4)) for i, n in enumerate((7, 0, 30))]
    boxes = [torch.cat((own[:, :2], own.view(-1, 2, 2).amax(dim=1)), dim=1) for own in boxes]
    boxes[0][0, 2:] = boxes[0][0, :2]
    candidates, is_valid = candidates.to(device), is_valid.to(device)
    objects = join_targets([Target(own, own[:, 0], own).to(device) for own in boxes])
    own = candidates[0] if is_shared else candidates
    found = assign_images(own, is_valid, objects, thresholds, kernels="triton")
    expected = assign_images(own, is_valid, objects, thresholds)
    assert found.equal(expected)
    assert set(expected[0].tolist()) > {-1, 1, 2}
    assert set(expected[1].tolist()) == {-1, -2}

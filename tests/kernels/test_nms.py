"""Non-maximum suppression in levels: equal to torchvision's, one level at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from downstream.detection.model.nms import suppress_in_levels

kernel = pytest.importorskip("downstream.detection.model.triton_nms", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # 0 / 0, of empty boxes


def clusters(count: int) -> Tensor:
    """Boxes around few centers, so that chains of boxes suppress each other."""
    centers = 40 * torch.rand(5, 2)[torch.randint(5, (count,))] + 8 * torch.rand(count, 2)
    sides = 5 + 25 * torch.rand(count, 2)
    return torch.cat((centers - sides / 2, centers + sides / 2), dim=1)


def chain(count: int) -> Tensor:
    """Boxes of which each overlaps the next one only enough: every second one survives."""
    x = torch.arange(count) * 1.5
    return torch.stack((x, torch.zeros(count), x + 10, torch.full((count,), 10.0)), dim=1)


def integers(count: int) -> Tensor:
    """Boxes of small integers: identical, touching, empty and inverted ones, and IoUs that equal the threshold."""
    return torch.randint(0, 5, (count, 4)).float()


@pytest.mark.parametrize("make", [clusters, chain, integers])
@pytest.mark.parametrize("threshold", [0.7, 0.5])
@pytest.mark.parametrize("counts", [(64, 1), (130, 0, 20)])
def test_survivors_are_those_of_torchvision(
    device: torch.device, make: Callable[[int], Tensor], threshold: float, counts: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    levels = [torch.stack([make(count), make(count)]) for count in counts]  # of two images
    expected = [torch.zeros(level.shape[:2], dtype=torch.bool) for level in levels]
    for level, own in zip(levels, expected, strict=True):
        for image in range(2):
            order = -torch.arange(level.shape[1]).float()
            own[image, nms(level[image], order, threshold)] = True
    found = kernel.suppress_with_kernel(torch.cat(levels, dim=1).to(device), counts, threshold)
    assert found.cpu().equal(torch.cat(expected, dim=1))
    assert 0 < found.sum() < found.numel()


def test_both_ways_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With levels side by side, and equal scores."""
    torch.manual_seed(0)
    boxes = torch.cat([clusters(90) + 1000 * level for level in range(2)])[None].to(device)
    scores = torch.cat([torch.linspace(1, 0, 90).mul(20).round().div(20)] * 2)[None].to(device)
    expected = suppress_in_levels(boxes, scores, (90, 90), 0.5)
    calls = []
    monkeypatch.setattr(
        kernel, "suppress_with_kernel", lambda *args, run=kernel.suppress_with_kernel: calls.append(1) or run(*args)
    )
    assert suppress_in_levels(boxes, scores, (90, 90), 0.5, kernels="triton").equal(expected)
    assert calls

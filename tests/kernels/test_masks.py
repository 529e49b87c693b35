"""Pasting of masks: PyTorch's, but for pixels where the interpolated probability is the threshold."""

import torch

from downstream.detection.model.masks import paste_eagerly, paste_masks


def test_masks_are_those_of_pytorch(device: torch.device) -> None:
    """Of boxes inside the image, across each side, of a pixel, and without area."""
    torch.manual_seed(0)
    rows = [[3, 4, 30, 20], [-9, -5, 12, 50], [25, 18, 60, 70.5], [7.2, 7.1, 8, 8], [5, 5, 5, 9]]
    boxes, probabilities = torch.tensor(rows), torch.rand(len(rows), 28, 28)
    expected = paste_eagerly(probabilities, boxes, 33, 47)
    found = paste_masks(probabilities.to(device), boxes.to(device), 33, 47, kernels="triton").cpu()
    assert found.dtype == torch.bool
    assert (found != expected).sum() <= 3
    assert expected.sum(dim=(1, 2)).bool().tolist() == [True, True, True, bool(expected[3].any()), False]
    assert paste_masks(probabilities[:0].to(device), boxes[:0].to(device), 3, 4, kernels="triton").shape == (0, 3, 4)

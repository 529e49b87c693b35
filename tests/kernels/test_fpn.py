"""The feature pyramid's sum with an upsampled map: PyTorch's values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from downstream.detection.model.fpn import add_upsampled


@pytest.mark.parametrize(("channels", "height", "width"), [(5, 3, 4), (260, 1, 3)])
def test_sums_and_gradients_are_those_of_interpolation(
    device: torch.device, channels: int, height: int, width: int
) -> None:
    torch.manual_seed(0)
    fine = torch.randn(2, channels, 2 * height, 2 * width, device=device, requires_grad=True)
    coarse = torch.randn(2, channels, height, width, device=device, requires_grad=True)
    expected = fine + F.interpolate(coarse, fine.shape[2:], mode="nearest")
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (fine, coarse), upstream)
    for kernels in ("triton", "torch"):
        found = add_upsampled(fine, coarse, kernels=kernels)
        assert found.equal(expected)
        torch.testing.assert_close(torch.autograd.grad(found, (fine, coarse), upstream), gradients)


def test_other_sizes_and_dtypes_are_interpolated(device: torch.device) -> None:
    fine, coarse = torch.randn(1, 2, 5, 8, device=device), torch.randn(1, 2, 3, 4, device=device)
    expected = fine + F.interpolate(coarse, (5, 8), mode="nearest")
    assert add_upsampled(fine, coarse, kernels="triton").equal(expected)
    assert add_upsampled(fine[:, :, :4, :2], coarse[:, :, :2, :1].bfloat16(), kernels="triton").dtype == torch.float32

"""Kernels that resize crops and erase boxes, against the PyTorch operations."""

import math

import pytest
import torch

from data import batch_decoding
from data.batch_crops import Crop, pack_bytes, resize_crops
from data.crop_kernels import erase_with_kernel, resize_with_kernel
from data.decoding import image_to_tensor
from tests.helpers import encoded, photo


def compare(result: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (result.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_crops_are_resized_as_with_pytorch(device: torch.device) -> None:
    shapes = [(1, 1), (64, 5), (7, 30), (23, 28), (12, 12), (40, 31)]
    images = [image_to_tensor(photo(*shape, seed)) for seed, shape in enumerate(shapes)]
    crops = torch.tensor(
        [Crop(x.numel(), 0, 0, 0, *x.shape[:2], 12, i % 3 > 0, i % 2 > 0) for i, x in enumerate(images)]
    )
    packed = pack_bytes(images)
    result = resize_with_kernel(packed, crops, device)
    compare(result, resize_crops(packed, crops, torch.device("cpu")))
    assert result[4].cpu().equal(images[4])  # has the size
    for image, crop, pixels in zip(images, crops, result, strict=True):
        assert resize_with_kernel(image.flatten(), crop[None], device)[0].equal(pixels)


def test_crops_of_jpegs_in_groups(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [photo(40, 61), photo(30, 30, 1), photo(64, 33, 2)]
    parts, crops = [], []
    for index, (image, (top, left, height, width)) in enumerate(
        zip(images, [(5, 10, 40, 20), (0, 0, 30, 30), (3, 1, 30, 30)], strict=True)
    ):
        file = torch.frombuffer(bytearray(encoded(image, quality=98, subsampling=0)), dtype=torch.uint8)
        parts.append(image_to_tensor(image) if index == 1 else file)
        num_pixels = 0 if index == 1 else image.width * image.height
        crops.append(Crop(parts[-1].numel(), num_pixels, top, left, height, width, 12, True, index == 2))
    monkeypatch.setattr(batch_decoding, "MAX_GROUP_PIXELS", 40 * 61)
    packed, rows = pack_bytes(parts), torch.tensor(crops)
    result, expected = resize_with_kernel(packed, rows, device).cpu(), resize_crops(packed, rows, torch.device("cpu"))
    if device.type == "cpu":
        compare(result, expected)
    assert (result.int() - expected.int()).abs().float().mean() < 1  # nvJPEG rounds differently


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_boxes_are_erased_with_noise_of_their_seeds(device: torch.device, mode: str) -> None:
    clean = torch.rand(3, 3, 20, 24).to(device, memory_format=torch.channels_last) + 5
    boxes = torch.tensor([(0, 3, 4, 15, 20, 2**61 + 3), (2, 0, 0, 4, 5, 7)])
    erased = clean.clone()
    erase_with_kernel(erased, boxes, mode)
    first, second = erased[0, :, 3:18, 4:24], erased[2, :, :4, :5]
    is_box = torch.zeros(3, 1, 20, 24, dtype=torch.bool, device=device)
    is_box[0, :, 3:18, 4:24] = is_box[2, :, :4, :5] = True
    assert erased.equal(torch.where(is_box, erased, clean))
    assert max(first.max(), second.max()) < 5
    alone = clean.clone()
    moved = boxes[:1] * torch.tensor([0, 1, 1, 1, 1, 1]) + torch.tensor([1, -1, -2, 0, 0, 0])
    erase_with_kernel(alone, moved, mode)
    assert alone[1, :, 2:17, 2:22].equal(first)  # wherever the box is
    if mode == "const":
        assert not first.any()
    elif mode == "rand":
        assert len(first.unique()) == 3
        assert (first == first[:, :1, :1]).all()
        assert not second[:, 0, 0].equal(first[:, 0, 0])
    else:
        assert len(first.unique()) > 890
        assert abs(first.mean().item()) < 3 / math.sqrt(900)
        assert abs(first.std().item() - 1) < 0.1

"""Kernels that resize crops and erase boxes, against the PyTorch operations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import load_config
from data import batch_decoding
from data.batch_crops import Crop, pack_bytes, resize_crops
from data.build import eval_loader, open_split
from data.crop_kernels import erase_with_kernel, resize_exactly, resize_with_kernel
from data.decoding import image_to_tensor
from data.exact_crops import whole_exact_crop
from data.prefetch import Normalizer
from data.samplers import SampleKey
from data.transforms import EvalTransform
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


@pytest.mark.parametrize(("mode", "crops"), [("bicubic", True), ("bicubic", False), ("bilinear", True)])
def test_evaluation_has_pillows_pixels(device: torch.device, mode: str, crops: bool) -> None:
    """Of images with noise, which is clipped, that get smaller or larger or stay, and of strips that Pillow resizes."""
    shapes = [(21, 16), (10, 10), (13, 13), (13, 17), (3, 4), (11, 40), (1, 2), (54, 15)]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.choice([0, 255, 99], (*shape, 3)).astype(np.uint8)) for shape in shapes]
    transform = EvalTransform(12, crop=crops, interpolation=mode)
    expected = torch.stack([transform(image).pixels for image in images])
    transform.on_device = True
    samples = [transform(image) for image in images]
    assert [shape for shape, sample in zip(shapes, samples, strict=True) if sample.crop is None][-1] == (54, 15)
    rows = torch.tensor([sample.crop or whole_exact_crop(sample.pixels) for sample in samples], dtype=torch.int64)
    assert resize_exactly(pack_bytes([sample.pixels for sample in samples]), rows, device).cpu().equal(expected)


def test_an_evaluation_loader_has_pillows_pixels_on_the_device(device: torch.device, tmp_path: Path) -> None:
    """Among them broken images, which are named, and images that a worker resizes; previews stay on the CPU."""
    for index, shape in enumerate([(50, 41), (90, 30), (34, 60), (40, 40)]):
        path = tmp_path / "val" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(*shape).save(path)
    (tmp_path / "val" / "a" / "9.png").write_bytes(b"")
    opts = ["DATA.DATA_PATH", str(tmp_path), "DATA.IMG_SIZE", "36", "DATA.NUM_WORKERS", "0", "DATA.ON_ERROR", "skip"]
    config = load_config("cfgs/mlla_t.yaml", opts)
    source = open_split(config, "val")
    exact = list(eval_loader(config, source, 0, 1, torch.device("cpu")))
    loader = eval_loader(config, source, 0, 1, torch.device("cpu"))
    loader.dataset.transform.on_device = True  # type: ignore[attr-defined]
    loader.device = device
    loader.normalizer = Normalizer(device)
    ((images, labels),), ((expected, _),) = list(loader), exact
    assert images.cpu().equal(expected)
    assert labels.tolist() == [0, 0, 1, 1]
    assert loader.broken == {str(tmp_path / "val" / "a" / "9.png")}
    batch = loader.dataset.without_device().__getitems__([SampleKey(0, 0)])
    assert batch.images.shape == (1, 36, 36, 3)


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

"""Crops that the device resizes, against the resizing in workers."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode

from config import load_config
from data.batch_crops import SMALL_SIDE, Crop, pack_bytes, resize_crops
from data.build import train_transform
from data.dataset import ImageDataset, keep_batch
from data.decoding import image_to_tensor
from data.samplers import SampleKey, TrainSampler
from data.sources.image_folder import ImageFolder
from data.transforms import resize
from tests.helpers import make_image_folder, photo

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [InterpolationMode.BICUBIC, InterpolationMode.BILINEAR])
def test_crops_are_resized_as_by_workers(mode: InterpolationMode, device: str) -> None:
    images = [image_to_tensor(photo(*size)) for size in ((90, 61), (31, 200), (48, 48), (3, 1))]
    crops = [
        Crop(image.numel(), 0, 0, 0, *image.shape[:2], 48, mode == InterpolationMode.BICUBIC, i % 2 == 1)
        for i, image in enumerate(images)
    ]
    result = resize_crops(pack_bytes(images), torch.tensor(crops, dtype=torch.int64), torch.device(device)).cpu()
    assert result.is_contiguous()
    for image, crop, pixels in zip(images, crops, result, strict=True):
        expected = resize(image, 48, 48, mode)
        difference = (pixels.int() - (expected.flip(1) if crop.is_flipped else expected).int()).abs()
        assert difference.max() <= 2  # workers round between the axes
        assert (difference > 1).float().mean() < 1e-3
    assert torch.equal(result[2], images[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [8, 32])
def test_small_crops_are_resized_together_as_alone(size: int, device: str) -> None:
    """In batches that are cut into parts too, and as `interpolate` does."""
    shapes = [(1, 1), (64, 5), (7, 64), (23, 28), (size, size), (33, 31), (2, 50), (64, 64)]
    images = [image_to_tensor(photo(*shape, seed)) for seed, shape in enumerate(shapes)]
    crops = torch.tensor(
        [Crop(x.numel(), 0, 0, 0, *x.shape[:2], size, i % 3 > 0, i % 2 > 0) for i, x in enumerate(images)]
    )
    together = resize_crops(pack_bytes(images), crops, torch.device(device)).cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.batch_crops.MAX_VALUES", 3 * 64 * 3 * size)
        assert resize_crops(pack_bytes(images), crops, torch.device(device)).cpu().equal(together)
    for image, crop, pixels in zip(images, crops, together, strict=True):
        assert resize_crops(image.flatten(), crop[None], torch.device(device))[0].cpu().equal(pixels)
        mode, channels_first = "bicubic" if crop[7] else "bilinear", image.permute(2, 0, 1)[None].float()
        resized = functional.interpolate(channels_first, size=(size, size), mode=mode, antialias=True)
        expected = resized[0].permute(1, 2, 0).round().clamp(0, 255)  # (size, size, 3)
        difference = ((expected.flip(1) if crop[8] else expected) - pixels.float()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-2


def test_a_device_that_decodes_also_resizes_what_workers_decode_at_the_same_draws(tmp_path: Path) -> None:
    make_image_folder(tmp_path, train=3, val=1)
    for index, path in enumerate(sorted(tmp_path.glob("train/*/*.jpg"))):
        photo(150 + 10 * index, 120, index).save(path)
    opts = ["DATA.IMG_SIZE", "72", "DATA.AUGMENT_ON", "gpu", "AUG.REPROB", "1.0", "DATA.DECODE_ON"]
    batches = []
    for place in ("cpu", "gpu"):
        transform = train_transform(load_config("cfgs/mlla_t.yaml", [*opts, place]), torch.device("cuda"))
        dataset = ImageDataset(ImageFolder(str(tmp_path), "train"), transform, 0)
        batches.append(dataset.__getitems__([SampleKey(0, index) for index in range(6)]))
    here, there = batches
    assert here.images.shape == (6, 72, 72, 3)
    assert there.crops[:, 4].max() > SMALL_SIDE
    assert here.operations.equal(there.operations)
    assert here.erasures.equal(there.erasures)
    difference = (resize_crops(there.images, there.crops, torch.device("cpu")).int() - here.images.int()).abs()
    assert difference.max() <= 3  # workers round between the axes
    assert (difference > 1).float().mean() < 1e-3


def test_batches_are_the_same_from_a_worker(image_folder: Path) -> None:
    """It passes the packed crops in shared memory."""
    transform = train_transform(
        load_config("cfgs/mlla_t.yaml", ["DATA.IMG_SIZE", "32", "DATA.AUGMENT_ON", "gpu"]), torch.device("cuda")
    )
    dataset = ImageDataset(ImageFolder(str(image_folder), "train"), transform, 0)
    sampler = TrainSampler(len(dataset), rank=0, num_processes=1, seed=0)
    here, there = (list(DataLoader(dataset, 4, sampler=sampler, num_workers=n, collate_fn=keep_batch)) for n in (0, 1))
    assert len(here) > 1
    for one, other in zip(here, there, strict=True):
        assert one.images.ndim == 1
        assert other.images.is_shared()
        assert not other.labels.is_shared()  # small tensors come through the pipe, which is faster
        assert all(a.equal(b) for a, b in zip(one[:5], other[:5], strict=True))

"""Our pipelines against the reference pipelines of timm and torchvision, at the same random draws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from data.augmentation import posterize
from data.batch_augmentation import augment
from data.batch_crops import pack_bytes, resize_crops, whole_crop
from data.decoding import image_to_tensor
from data.errors import DataError
from data.prefetch import Normalizer
from data.transforms import EvalTransform, TrainTransform, denormalize
from tests.helpers import photo

CPU = torch.device("cpu")
REFERENCE = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "color_jitter": 0.0}


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_transform(size: int, **changes: object) -> TrainTransform:
    settings = (
        REFERENCE | {"interpolation": "bicubic", "auto_augment": "none", "erase_prob": 0.0, "erase_count": 1} | changes
    )
    return TrainTransform(size, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_crop_resize_and_flip_match_timm(size: int, interpolation: str) -> None:
    ours = make_transform(size, interpolation=interpolation)
    theirs = create_transform(size, is_training=True, interpolation=interpolation, separate=True, **REFERENCE)[0]
    image = photo(250, 180)
    for seed in range(20):
        seed_all(seed)
        expected = np.asarray(theirs(image)).astype(int)
        seed_all(seed)
        pixels, _, _, erasures = ours(image_to_tensor(image))
        difference = np.abs(pixels.numpy().astype(int) - expected)
        assert difference.max() <= 2  # rounding of two passes
        assert (difference > 1).mean() < 0.001
        assert not erasures


@pytest.mark.parametrize("size", [32, 28])
def test_small_images_of_the_size_are_padded_and_cropped_as_in_the_official_code(size: int) -> None:
    ours, on_device = make_transform(size, scale=None), make_transform(size, scale=None, on_device=True)
    theirs = create_transform(size, is_training=True, interpolation="bicubic", separate=True, **REFERENCE)[0]
    theirs.transforms[0] = transforms.RandomCrop(size, padding=4)
    image = photo(size, size)
    for seed in range(20):
        seed_all(seed)
        expected = np.asarray(theirs(image))
        seed_all(seed)
        assert np.array_equal(ours(image_to_tensor(image)).pixels, expected)
        seed_all(seed)
        sample = on_device(image_to_tensor(image))
        assert np.array_equal(resize_crops(pack_bytes([sample.pixels]), torch.tensor([sample.crop]), CPU)[0], expected)


@pytest.mark.parametrize(
    ("size", "width_height", "scale"),
    [(32, (32, 31), None), (32, (40, 40), None), (33, (33, 33), None), (32, (32, 32), (0.08, 1.0))],
)
def test_all_other_images_are_cropped_and_resized(
    size: int, width_height: tuple[int, int], scale: tuple[float, float] | None
) -> None:
    pixels = image_to_tensor(photo(*width_height))
    seed_all(3)
    expected = make_transform(size).resized_crop(pixels)
    seed_all(3)
    assert make_transform(size, scale=scale).resized_crop(pixels).equal(expected)


@pytest.mark.parametrize("crop", [True, False])
def test_evaluation_does_not_resize_small_images_of_the_size(crop: bool) -> None:
    for size, width_height, stays in (
        (32, (32, 32), True),
        (28, (28, 28), True),
        (32, (40, 40), False),
        (48, (48, 48), not crop),
    ):
        image = photo(*width_height)
        transform = EvalTransform(size, crop=crop, interpolation="bicubic")
        for source in (image, image_to_tensor(image)):
            pixels = transform(source).pixels
            assert pixels.shape == (size, size, 3)
            assert np.array_equal(pixels, np.asarray(image)) == stays


def test_the_whole_pipeline_matches_timm_at_the_same_draws() -> None:
    policy = "rand-m9-mstd0.5-inc1"
    ours = make_transform(96, auto_augment=policy, erase_prob=0.25)
    theirs = create_transform(
        96, is_training=True, interpolation="bicubic", auto_augment=policy, separate=True, **REFERENCE
    )
    for op in theirs[1].transforms[0].ops:
        op.aug_fn = posterize if op.name.startswith("Posterize") else op.aug_fn  # timm's fails with new Pillow
    image = photo(250, 180)
    for seed in range(100):
        seed_all(seed)
        expected = np.asarray(theirs[1](theirs[0](image))).astype(int)
        following = random.random()
        seed_all(seed)
        pixels, _, _, erasures = ours(image_to_tensor(image))
        assert pixels.shape == (96, 96, 3)
        assert pixels.is_contiguous()
        assert np.abs(pixels.numpy().astype(int) - expected).mean() < 1.0
        assert bool(erasures) == (following <= 0.25)


@pytest.mark.parametrize(("size", "num_left"), [(72, 0), (64, 41), (20, 41)])
def test_work_left_to_the_device_has_the_same_draws(size: int, num_left: int) -> None:
    """Crops of up to 64 pixels that become such images are left to the device, but not larger ones."""
    settings = {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "random", "erase_prob": 0.5}
    host, device = make_transform(size, **settings), make_transform(size, **settings, on_device=True)
    pixels = image_to_tensor(photo(90, 70))
    samples, expected = [], []
    for seed in range(60):
        for transform, results in ((host, expected), (device, samples)):
            seed_all(seed)
            results.append(transform(pixels))
        assert samples[-1].erasures == expected[-1].erasures
    assert sum(sample.crop is not None for sample in samples) == num_left
    crops = [sample.crop or whole_crop(sample.pixels) for sample in samples]
    packed = pack_bytes([sample.pixels for sample in samples])
    images = resize_crops(packed, torch.tensor(crops, dtype=torch.int64), CPU)
    rows = [(i, place, *op) for i, sample in enumerate(samples) for place, op in enumerate(sample.operations)]
    assert 30 < len(rows) < 90  # two per image with probability 0.5
    images = augment(images, torch.tensor(rows, dtype=torch.float64))
    difference = (images.int() - torch.stack([sample.pixels for sample in expected]).int()).abs()
    # Operations may enlarge the one level of resizing.
    assert (difference > 1).float().mean() < (0.02 if num_left else 1e-3)


def test_a_policy_that_the_device_does_not_support_is_named() -> None:
    cases = [("augmix-m3-w3", 0.0, "AugMixAugment"), ("none", 0.4, "ColorJitter"), ("rand-m9-t3a", 0.0, "GaussianBlur")]
    for policy, jitter, name in cases:
        with pytest.raises(DataError, match=f"^DATA.AUGMENT_ON gpu: {name} is not supported there; set it to cpu"):
            make_transform(32, auto_augment=policy, color_jitter=jitter, on_device=True)
    assert make_transform(32, on_device=True)


class Recorder(torch.Tensor):
    """Records where random erasing writes."""

    boxes: list[tuple[int, int, int, int]]

    def __setitem__(self, index: tuple[slice, slice, slice], value: object) -> None:
        _, rows, columns = index
        self.boxes.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


@pytest.mark.parametrize("count", [1, 3])
def test_erased_boxes_match_timm(count: int) -> None:
    ours = make_transform(224, erase_prob=0.5, erase_count=count)
    theirs = RandomErasing(0.5, mode="const", max_count=count, device="cpu")
    seen = 0
    for seed in range(200):
        seed_all(seed)
        canvas = torch.zeros(3, 224, 224).as_subclass(Recorder)
        canvas.boxes = []
        theirs(canvas)
        seed_all(seed)
        erasures = ours.draw_erasures()
        assert [erasure[:4] for erasure in erasures] == canvas.boxes
        assert len({erasure.seed for erasure in erasures}) == len(erasures)
        seen += len(erasures)
    assert seen > 50


def test_training_transform_flips_only_if_asked() -> None:
    image = torch.arange(64 * 64 * 3, dtype=torch.uint8).reshape(64, 64, 3)

    def outcomes(hflip: float) -> int:
        transform = make_transform(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=hflip)
        return len({transform(image)[0].numpy().tobytes() for _ in range(20)})

    assert outcomes(0.0) == 1
    assert outcomes(0.5) == 2


@pytest.mark.parametrize("width_height", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_tiny_images_get_the_full_size(width_height: tuple[int, int]) -> None:
    image = photo(*width_height)
    training, evaluation = make_transform(32), EvalTransform(32, crop=True, interpolation="bicubic")
    for seed in range(50):
        seed_all(seed)
        assert training(image_to_tensor(image))[0].shape == (32, 32, 3)
    assert evaluation(image_to_tensor(image))[0].shape == (32, 32, 3)
    assert evaluation(image)[0].shape == (32, 32, 3)


def test_every_draw_of_every_small_image_gives_the_full_size() -> None:
    """All sizes from 1 to 8 pixels, with crops that round to no pixel and begin after the last one."""
    transforms = [make_transform(8, scale=(0.0, 1.0), ratio=ratio) for ratio in ((3 / 4, 4 / 3), (0.01, 100.0))]
    seed_all(0)
    for height in range(1, 9):
        for width in range(1, 9):
            pixels = image_to_tensor(photo(width, height))
            for transform in transforms:
                assert all(transform(pixels)[0].shape == (8, 8, 3) for _ in range(15))


@pytest.mark.parametrize("width_height", [(20_000, 1), (2, 65_000), (65_001, 2)])
def test_evaluation_of_strips_takes_little_memory(
    width_height: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ends of a strip are cut off before resizing, which changes the center crop by rounding only."""
    width, height = width_height
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    transform = EvalTransform(8, crop=True, interpolation="bicubic")  # small enough to do it the long way, too
    expected = transform(Image.fromarray(pixels))[0].numpy().astype(int)
    monkeypatch.setattr("data.transforms.MAX_PIXELS", 50_000)
    for image in (Image.fromarray(pixels), torch.from_numpy(pixels)):
        assert max(np.asarray(transform.without_ends(image)).shape) < 30
        assert np.abs(transform(image)[0].numpy().astype(int) - expected).max() <= 2
    square = photo(8, 8)
    assert transform.without_ends(square) is square


def test_evaluation_transform_resizes_to_256_224ths_and_crops_the_center() -> None:
    gradient = np.broadcast_to(np.arange(512, dtype=np.float32)[None] / 2, (256, 512)).astype(np.uint8)
    image = Image.fromarray(gradient).convert("RGB")
    cropped = EvalTransform(224, crop=True, interpolation="bicubic")(image)[0][0, :, 0].float()
    assert cropped.shape == (224,)
    # The short side is 256 already: the middle 224 of 512 columns, whose values are half their index.
    assert cropped[0].item() == pytest.approx(144 / 2, abs=1.5)
    assert cropped[-1].item() == pytest.approx(367 / 2, abs=1.5)
    squeezed = EvalTransform(224, crop=False, interpolation="bicubic")(image)[0][0, :, 0].float()
    assert squeezed[0].item() == pytest.approx(0, abs=2)
    assert squeezed[-1].item() == pytest.approx(255, abs=2)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (224, 500)])
def test_exact_evaluation_matches_torchvision_and_the_fast_one_is_close(size: tuple[int, int]) -> None:
    reference = transforms.Compose(
        [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    image = photo(*size)
    expected = np.asarray(reference(image)).astype(int)
    transform = EvalTransform(224, crop=True, interpolation="bicubic")
    assert np.array_equal(transform(image)[0].numpy(), expected)
    difference = np.abs(transform(image_to_tensor(image))[0].numpy().astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.1


@pytest.mark.parametrize("size", [384, 256, 320, 160])
@pytest.mark.parametrize("width_height", [(500, 375), (333, 500), (97, 64)])
def test_evaluation_has_the_official_bits_at_sizes_other_than_224(size: int, width_height: tuple[int, int]) -> None:
    image = photo(*width_height)
    official = transforms.Compose(
        [
            transforms.Resize(int((256 / 224) * size), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    transform = EvalTransform(size, crop=True, interpolation="bicubic")
    expected = official(image)
    pixels = transform(image)[0]
    assert Normalizer()(pixels.permute(2, 0, 1)[None])[0].equal(expected)
    difference = (transform(image_to_tensor(image))[0].float() - pixels.float()).abs()  # of the fast path
    assert difference.max() <= 2  # rounding of two passes
    assert difference.mean() < 0.1


def test_random_interpolation_evaluates_bilinearly() -> None:
    image = photo(97, 64)
    pixels = EvalTransform(48, crop=False, interpolation="random")(image)[0]
    assert np.array_equal(pixels, np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR)))


def test_denormalize_by_hand() -> None:
    normalized = torch.tensor([(1.0 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.0 - 0.406) / 0.225]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(denormalize(normalized).flatten(), torch.tensor([1.0, 0.5, 0.0]))

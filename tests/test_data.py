import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_image_folder
from PIL import Image
from yacs.config import CfgNode

from config import load_config
from data import build_data, build_targets
from data.digits import Digits
from data.samplers import EvalSampler, SampleKey, TrainSampler, TransformedImages, random_state_of
from data.transforms import denormalise, eval_transform, posterize, train_transform


def digits_config(*opts: str) -> CfgNode:
    return load_config("cfgs/digits.yaml", opts)


def folder_config(folder: Path, *opts: str) -> CfgNode:
    base = ["DATA.DATA_PATH", str(folder), "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0"]
    return load_config("cfgs/mlla_t.yaml", [*base, *opts])


def test_digits_split_is_stratified_fixed_and_disjoint() -> None:
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    assert set(Counter(val.labels).values()) == {36}
    assert val.labels[:10] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    image, label = train[0]
    assert (image.size, image.mode, label) == ((32, 32), "RGB", train.labels[0])
    # Every image is in one split: their mean brightness is that of scikit-learn's whole set.
    total = sum(float(np.asarray(image).mean()) for image in train.images + val.images) / 1797
    assert total == pytest.approx(4.884 * 255 / 16, rel=0.02)


def test_train_shares_are_disjoint_equal_and_repeatable() -> None:
    samplers = [TrainSampler(103, rank=rank, num_processes=4, seed=1) for rank in range(4)]
    shares = [[key.position for key in sampler] for sampler in samplers]
    assert [len(share) for share in shares] == [25] * 4
    assert len(set().union(*shares)) == 100
    assert [key.position for key in samplers[0]] == shares[0]
    samplers[0].set_epoch(1)
    other = list(samplers[0])
    assert [key.position for key in other] != shares[0]
    assert {key.epoch for key in other} == {1}


def test_an_epoch_goes_on_where_it_stopped() -> None:
    sampler = TrainSampler(23, rank=1, num_processes=2, seed=0)
    sampler.set_epoch(3)
    whole = list(sampler)
    assert len(whole) == len(sampler) == 11
    for start in (0, 4, 11):
        sampler.set_epoch(3, start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == 11 - start
    sampler.set_epoch(4)
    assert len(list(sampler)) == 11
    for start in (-1, 12):
        with pytest.raises(ValueError, match="an epoch has 11 images"):
            sampler.set_epoch(4, start)


def test_the_images_of_a_step_do_not_depend_on_the_number_of_processes() -> None:
    one = [key.position for key in TrainSampler(64, rank=0, num_processes=1, seed=0)]
    two = [[key.position for key in TrainSampler(64, rank=rank, num_processes=2, seed=0)] for rank in (0, 1)]
    for step in range(8):
        assert set(one[8 * step : 8 * step + 8]) == {p for share in two for p in share[4 * step : 4 * step + 4]}


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_evaluation_shares_hold_each_image_once(num_processes: int) -> None:
    shares = [list(EvalSampler(101, rank=rank, num_processes=num_processes)) for rank in range(num_processes)]
    assert sorted(key.position for share in shares for key in share) == list(range(101))
    assert [len(EvalSampler(101, rank=r, num_processes=num_processes)) for r in range(num_processes)] == [
        len(share) for share in shares
    ]


def test_random_state_is_put_back() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    with random_state_of(0, 1, 2):
        first = [random.random(), np.random.rand(), torch.rand(1).item()]
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == expected
    with random_state_of(0, 1, 2):
        assert [random.random(), np.random.rand(), torch.rand(1).item()] == first
    with random_state_of(0, 1, 3):
        assert [random.random(), np.random.rand(), torch.rand(1).item()] != first


def test_batches_do_not_depend_on_the_number_of_workers(image_folder: Path) -> None:
    def batches(workers: int) -> list[torch.Tensor]:
        config = folder_config(image_folder, "DATA.NUM_WORKERS", str(workers))
        loader = build_data(config, rank=0, num_processes=1).train
        assert loader is not None
        seen = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            seen += [images for images, _ in loader]
        return seen

    alone, helped = batches(0), batches(2)
    assert len(alone) == 8
    assert all(a.equal(b) for a, b in zip(alone, helped, strict=True))
    assert not alone[0].equal(alone[4])


def test_image_folder(image_folder: Path) -> None:
    data = build_data(folder_config(image_folder), rank=0, num_processes=1)
    assert data.classes == ["cat", "dog"]
    assert (data.num_train_images, data.num_val_images) == (16, 10)
    images, labels = next(iter(data.val))
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 0]
    preview, preview_labels = data.preview(4)
    assert preview.shape == (4, 3, 32, 32)
    assert preview_labels == [0, 0, 1, 1]


def test_evaluation_needs_no_training_images(tmp_path: Path) -> None:
    make_image_folder(tmp_path, train=1, val=2)
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.unlink()
    data = build_data(folder_config(tmp_path, "EVAL_MODE", "True"), rank=0, num_processes=1)
    assert data.train is None
    assert data.num_val_images == 4


def test_data_mistakes(tmp_path: Path) -> None:
    def complaint(*opts: str, kind: type[Exception] = FileNotFoundError) -> str:
        with pytest.raises(kind) as caught:
            build_data(folder_config(tmp_path, *opts), rank=0, num_processes=1)
        return str(caught.value)

    assert "it must hold train/ and val/" in complaint()
    make_image_folder(tmp_path, train=1, val=1)
    assert "the data set has 2 classes" in complaint("MODEL.NUM_CLASSES", "1000", kind=ValueError)
    (tmp_path / "train" / "emu").mkdir()
    (tmp_path / "train" / "emu" / "notes.txt").write_text("no image")
    assert "emu: a class folder without images" in complaint()
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "emu" / "0.png")
    assert "only in one of them: emu" in complaint(kind=ValueError)
    assert "DATA.DATA_PATH is empty" in complaint("DATA.DATA_PATH", "")


def test_evaluation_transform_resizes_to_256_224ths_and_crops_the_centre() -> None:
    gradient = np.broadcast_to(np.arange(512, dtype=np.float32)[None] / 2, (256, 512)).astype(np.uint8)
    image = Image.fromarray(gradient).convert("RGB")
    cropped = denormalise(eval_transform(224, crop=True, interpolation="bicubic")(image)[None])[0, 0, 0] * 255
    assert cropped.shape == (224,)
    # The short side is 256 already: the middle 224 of 512 columns, whose values are half their index.
    assert cropped[0].item() == pytest.approx(144 / 2, abs=1.5)
    assert cropped[-1].item() == pytest.approx(367 / 2, abs=1.5)
    squeezed = denormalise(eval_transform(224, crop=False, interpolation="bicubic")(image)[None])[0, 0, 0] * 255
    assert squeezed[0].item() == pytest.approx(0, abs=2)
    assert squeezed[-1].item() == pytest.approx(255, abs=2)


def test_training_transform_flips_only_where_asked() -> None:
    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))

    def outcomes(hflip: float) -> int:
        transform = train_transform(
            32,
            interpolation="bilinear",
            scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            hflip=hflip,
            auto_augment="none",
            color_jitter=0.0,
            erase_prob=0.0,
            erase_mode="pixel",
            erase_count=1,
        )
        return len({transform(image).numpy().tobytes() for _ in range(20)})

    assert outcomes(0.0) == 1
    assert outcomes(0.5) == 2


@pytest.mark.parametrize("policy", ["rand-m10-n2-inc1", "original-mstd0.5", "v0-mstd0.5", "augmix-m10", "3a"])
def test_every_policy_runs_at_its_strongest(image_folder: Path, policy: str) -> None:
    """timm's posterize asks for 0 bits there, which new versions of Pillow refuse."""
    loader = build_data(folder_config(image_folder, "AUG.AUTO_AUGMENT", policy), rank=0, num_processes=1).train
    assert loader is not None
    for epoch in range(8):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for images, _ in loader:
            assert torch.isfinite(images).all()


def test_posterize_by_hand() -> None:
    image = Image.new("RGB", (2, 2), (0b10110111, 255, 1))
    assert posterize(image, 8).getpixel((0, 0)) == (0b10110111, 255, 1)
    assert posterize(image, 2).getpixel((0, 0)) == (0b10000000, 0b11000000, 0)
    assert posterize(image, 0).getpixel((0, 0)) == (0, 0, 0)


def test_unreadable_policy(image_folder: Path) -> None:
    with pytest.raises(ValueError, match="timm cannot read this policy"):
        build_data(folder_config(image_folder, "AUG.AUTO_AUGMENT", "rand-x9"), rank=0, num_processes=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), (0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_targets_in_every_combination(mixup: float, cutmix: float, smoothing: float, mode: str) -> None:
    opts = ["AUG.MIXUP", mixup, "AUG.CUTMIX", cutmix, "MODEL.LABEL_SMOOTHING", smoothing, "AUG.MIXUP_MODE", mode]
    make_targets = build_targets(digits_config(*map(str, opts)), num_classes=10)
    labels = torch.tensor([0, 1, 2, 3])
    originals = torch.randn(4, 3, 32, 32)
    images, targets = make_targets(originals.clone(), labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    floor = smoothing / 10
    assert targets.min().item() == pytest.approx(floor)
    if mixup or cutmix:
        # Image i is mixed with image 3 - i, and only their two classes share the label.
        torch.testing.assert_close(targets[0, 0] + targets[0, 3], torch.tensor(1 - 8 * floor))
    else:
        assert images.equal(originals)
        torch.testing.assert_close(targets.max(1).values, torch.full((4,), 1 - smoothing + floor))
        assert targets.argmax(1).equal(labels)


def test_transformed_images_draw_from_seed_epoch_and_position() -> None:
    dataset = TransformedImages(Digits("val"), lambda _: torch.rand(1), seed=3)
    assert dataset[SampleKey(0, 5)][0] == dataset[SampleKey(0, 5)][0]
    assert dataset[SampleKey(0, 5)][0] != dataset[SampleKey(1, 5)][0]
    assert dataset[SampleKey(0, 5)][0] != dataset[SampleKey(0, 6)][0]
    assert dataset[SampleKey(0, 5)][1] == Digits("val").labels[5]

from pathlib import Path

import pytest
import torch
from conftest import make_image_folder
from PIL import Image
from yacs.config import CfgNode

from config import load_config
from data import build_data, build_targets


def digits_config(*opts: str) -> CfgNode:
    return load_config("cfgs/digits.yaml", opts)


def folder_config(folder: Path, *opts: str) -> CfgNode:
    base = ["DATA.DATA_PATH", str(folder), "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0"]
    return load_config("cfgs/mlla_t.yaml", [*base, *opts])


def test_batches_do_not_depend_on_the_number_of_workers(image_folder: Path) -> None:
    def batches(workers: int) -> list[torch.Tensor]:
        config = folder_config(image_folder, "DATA.NUM_WORKERS", str(workers))
        loader = build_data(config).train
        assert loader is not None
        seen = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            seen += [images for images, _ in loader]
        return seen

    alone, helped = batches(0), batches(2)
    assert len(alone) == 8
    assert all(a.equal(b) for a, b in zip(alone, helped, strict=True))
    assert not alone[0].equal(alone[4])


def test_image_folder(image_folder: Path) -> None:
    data = build_data(folder_config(image_folder))
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
    data = build_data(folder_config(tmp_path, "EVAL_MODE", "True"))
    assert data.train is None
    assert data.num_val_images == 4


def test_data_mistakes(tmp_path: Path) -> None:
    def complaint(*opts: str, kind: type[Exception] = FileNotFoundError) -> str:
        with pytest.raises(kind) as caught:
            build_data(folder_config(tmp_path, *opts))
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


@pytest.mark.parametrize("policy", ["rand-m10-n2-inc1", "original-mstd0.5", "v0-mstd0.5", "augmix-m10", "3a"])
def test_every_policy_runs_at_its_strongest(image_folder: Path, policy: str) -> None:
    """timm's posterize asks for 0 bits there, which new versions of Pillow refuse."""
    loader = build_data(folder_config(image_folder, "AUG.AUTO_AUGMENT", policy)).train
    assert loader is not None
    for epoch in range(8):
        loader.set_epoch(epoch)
        for images, _ in loader:
            assert torch.isfinite(images).all()


def test_unreadable_policy(image_folder: Path) -> None:
    with pytest.raises(ValueError, match="timm cannot read this policy"):
        build_data(folder_config(image_folder, "AUG.AUTO_AUGMENT", "rand-x9"))


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

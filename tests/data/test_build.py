import io
import pickle
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from config import load_config
from data import Data, build_data, build_targets, kernels_in_use, make_zip
from data.build import train_transform
from data.errors import BrokenImageError, DataError
from data.samplers import SampleKey
from models import MLLA
from tests.helpers import MICRO, encoded, fill_weights, make_image_folder, photo
from utils.config.errors import MissingFileError, UserError


def digits_config(*opts: str) -> CfgNode:
    return load_config("cfgs/digits.yaml", opts)


def folder_config(folder: Path, *opts: str) -> CfgNode:
    base = ["DATA.DATA_PATH", str(folder), "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0"]
    return load_config("cfgs/mlla_t.yaml", [*base, *opts])


@pytest.mark.parametrize(
    ("file", "pads"), [("mlla_t", True), ("digits", False), ("digits_pretrain", False), ("fashion_mnist", False)]
)
def test_small_images_are_padded_unless_the_file_has_a_scale(file: str, pads: bool) -> None:
    size = [] if file != "mlla_t" else ["DATA.IMG_SIZE", "32"]
    assert train_transform(load_config(f"cfgs/{file}.yaml", size), torch.device("cpu")).pads == pads


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
    assert data.train is not None
    assert data.train.loader.next_loader is data.val.loader
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


def test_evaluation_accepts_more_outputs_than_classes(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = build_data(folder_config(image_folder, "EVAL_MODE", "True", "MODEL.NUM_CLASSES", "1000"))
    assert data.classes == ["cat", "dog"]
    assert "the dataset has 2 classes, which stand for the first outputs" in caplog.text
    with pytest.raises(DataError, match=r"MODEL\.NUM_CLASSES 1: the dataset has 2 classes"):
        build_data(folder_config(image_folder, "EVAL_MODE", "True", "MODEL.NUM_CLASSES", "1"))


def test_user_errors_in_folders_and_classes(tmp_path: Path) -> None:
    def complaint(*opts: str, kind: type[UserError] = MissingFileError) -> str:
        with pytest.raises(kind) as caught:
            build_data(folder_config(tmp_path, *opts))
        return str(caught.value)

    assert "it must hold train/ and val/" in complaint()
    make_image_folder(tmp_path, train=1, val=1)
    assert "the dataset has 2 classes" in complaint("MODEL.NUM_CLASSES", "1000", kind=DataError)
    (tmp_path / "train" / "emu").mkdir()
    (tmp_path / "train" / "emu" / "notes.txt").write_text("no image")
    assert "emu: a class folder without images" in complaint()
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "emu" / "0.png")
    assert "only in one of them: emu" in complaint(kind=DataError)
    assert "DATA.DATA_PATH is empty" in complaint("DATA.DATA_PATH", "")


@pytest.fixture(scope="module")
def zipped_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zipped")
    assert make_zip.main([str(image_folder), str(folder)]) == 0
    return folder


def all_batches(data: Data, epochs: int = 2) -> list[Tensor]:
    assert data.train is not None
    seen = []
    for epoch in range(epochs):
        data.train.set_epoch(epoch)
        seen += [images for images, _ in data.train]
    return seen + [images for images, _ in data.val]


@pytest.mark.parametrize("mode", ["no", "part", "full"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_archives_give_the_batches_of_folders(image_folder: Path, zipped_folder: Path, mode: str, workers: str) -> None:
    keys = ["DATA.ZIP_MODE", "True", "DATA.CACHE_MODE", mode, "DATA.NUM_WORKERS", workers]
    share = {} if mode == "full" else {"rank": 1, "num_processes": 2}
    zipped = build_data(folder_config(zipped_folder, *keys), **share)
    unzipped = build_data(folder_config(image_folder), **share)
    assert zipped.classes == unzipped.classes
    if mode == "part":  # permutes a process's shard, in an order of its own
        assert unzipped.train is not None
        unzipped.train.loader.sampler.keeps_shard = True  # type: ignore[attr-defined]
    assert all(a.equal(b) for a, b in zip(all_batches(zipped), all_batches(unzipped), strict=True))


@pytest.mark.parametrize("mode", ["no", "part"])
def test_one_image_for_two_processes(tmp_path: Path, mode: str) -> None:
    make_image_folder(tmp_path / "images", train=1, val=1)
    assert make_zip.main([str(tmp_path / "images"), str(tmp_path / "zips")]) == 0
    (tmp_path / "zips" / "val_map.txt").write_text("cat/0.jpg\t0\n")
    config = folder_config(tmp_path / "zips", "DATA.ZIP_MODE", "True", "DATA.CACHE_MODE", mode, "DATA.NUM_WORKERS", "1")
    first, second = (build_data(config, rank=rank, num_processes=2) for rank in range(2))
    assert [len(labels) for _, labels in first.val] == [1]
    assert list(second.val) == []
    assert first.train is not None
    assert len(first.train) == 0  # each process gets as many: none


def test_datasets_can_be_pickled_for_spawned_workers(image_folder: Path, zipped_folder: Path) -> None:
    for config in (folder_config(image_folder), folder_config(zipped_folder, "DATA.ZIP_MODE", "True"), digits_config()):
        train = build_data(config).train
        assert train is not None
        keys = [SampleKey(1, slot, slot) for slot in range(8)]
        sent = pickle.loads(pickle.dumps(train.dataset))
        assert sent.__getitems__(keys).images.equal(train.dataset.__getitems__(keys).images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_batches_on_a_gpu_are_those_on_the_cpu(image_folder: Path, workers: str) -> None:
    """Prefetched from pinned memory. Erased parts hold other noise, which is the same in every run."""
    keys = ["DATA.NUM_WORKERS", workers, "AUG.REPROB"]
    cpu = all_batches(build_data(folder_config(image_folder, *keys, "0.0")))
    gpu = all_batches(build_data(folder_config(image_folder, *keys, "0.0"), device="cuda"))
    assert all(a.device.type == "cuda" and a.cpu().equal(b) for a, b in zip(gpu, cpu, strict=True))
    first, again = (all_batches(build_data(folder_config(image_folder, *keys, "1.0"), device="cuda")) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(gpu[0])


@pytest.mark.parametrize("workers", ["0", "1", "4"])
def test_an_epoch_resumed_in_its_middle_is_the_same(image_folder: Path, workers: str) -> None:
    train = build_data(folder_config(image_folder, "AUG.REPROB", "1.0")).train
    resumed = build_data(folder_config(image_folder, "AUG.REPROB", "1.0", "DATA.NUM_WORKERS", workers)).train
    assert train is not None
    assert resumed is not None
    train.set_epoch(3)
    whole = [(images, labels) for images, labels in train]
    resumed.set_epoch(3, start=8)
    rest = list(resumed)
    assert len(rest) == len(resumed) == 2
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(whole[2:], rest, strict=True))


@pytest.mark.parametrize("other", [None, (2, 0), (1, 4)])
def test_an_epoch_that_began_during_evaluation_is_the_same_and_another_one_too(
    image_folder: Path, other: tuple[int, int] | None
) -> None:
    alone, data = (build_data(folder_config(image_folder, "DATA.NUM_WORKERS", workers)) for workers in "02")
    assert alone.train is not None
    assert data.train is not None
    list(data.train)
    data.expect_epoch(1)
    list(data.val)
    assert data.train.loader.started_iterator is not None
    epoch, start = other or (1, 0)
    for loader in (alone.train, data.train):
        loader.set_epoch(epoch, start)
    pairs = zip(list(alone.train), list(data.train), strict=True)
    assert all(a.equal(b) for (a, _), (b, _) in pairs)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_images_stop_the_run_or_are_skipped(tmp_path: Path, workers: str) -> None:
    make_image_folder(tmp_path, train=8, val=5)
    for split in ("train", "val"):
        (tmp_path / split / "cat" / "3.jpg").write_bytes(b"text")
    keys = ["DATA.NUM_WORKERS", workers]
    stopping = build_data(folder_config(tmp_path, *keys))
    for loader in (stopping.train, stopping.val):
        with pytest.raises(
            BrokenImageError, match=r"^\S*/cat/3\.jpg: not an image, .*; repair it, or set DATA\.ON_ERROR"
        ):
            list(loader)  # type: ignore[arg-type]
    skipping = build_data(folder_config(tmp_path, *keys, "DATA.ON_ERROR", "skip", "DATA.MAX_BAD", "1"))
    assert skipping.train is not None
    assert [len(labels) for _, labels in skipping.train] == [4, 4, 4, 4]  # another image replaces it
    assert sum(len(labels) for _, labels in skipping.val) == 9  # evaluation counts no image twice
    images, labels = skipping.preview(10)
    assert len(images) == len(labels) == 9
    (tmp_path / "train" / "dog" / "0.jpg").write_bytes(b"")
    with pytest.raises(BrokenImageError, match=r"DATA\.MAX_BAD 1: 2 images of this process"):
        list(skipping.train)
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    patient = build_data(folder_config(tmp_path, *keys, "DATA.ON_ERROR", "skip")).train
    with pytest.raises(BrokenImageError, match=r"^\S+\.jpg: no image can replace it, all are broken$"):
        list(patient)  # type: ignore[arg-type]


def test_fast_evaluation_gives_nearly_the_same_logits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                data = encoded(photo(160, 120, index + 4 * (name == "dog")), quality=90)
                (tmp_path / split / name / f"{index}.jpg").write_bytes(data)
    model = MLLA(num_classes=10, **MICRO).eval()  # type: ignore[arg-type]
    fill_weights(model)
    keys = ["EVAL_MODE", "True", "DATA.IMG_SIZE", "64", "DATA.BATCH_SIZE", "8"]
    exact, fast = (
        model(next(iter(build_data(folder_config(tmp_path, *keys, "DATA.EXACT_EVAL", value)).val))[0])
        for value in ("True", "False")
    )
    difference = (exact - fast).abs().max().item()
    assert 0 < difference < 0.05 * exact.std().item()


def write_labels(path: Path, labels: Iterable[int]) -> None:
    """Write a shard of an image per label."""
    with tarfile.open(path, "w") as archive:
        for index, label in enumerate(labels):
            files = ((f"{index}.jpg", encoded(photo(50, 40, index))), (f"{index}.cls", b"%d" % label))
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def test_webdataset_shards(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 3)):
        write_labels(tmp_path / f"{split}.tar", [index % 2 for index in range(count)])
    data = build_data(folder_config(tmp_path, "DATA.DATASET", "wds/"))
    assert (data.num_train_images, data.num_val_images, data.classes) == (8, 3, ["0", "1"])
    assert [batch.shape for batch in all_batches(data, epochs=1)] == [(4, 3, 32, 32)] * 2 + [(3, 3, 32, 32)]


def test_numbered_splits_may_lack_the_last_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The number of classes is that of both splits; a class without training images is counted in the log."""
    write_labels(tmp_path / "train.tar", [1, 2, 3, 1, 2, 3])
    write_labels(tmp_path / "val.tar", [1, 2])
    assert build_data(folder_config(tmp_path, "DATA.DATASET", "wds/")).classes == ["0", "1", "2", "3"]
    assert "1 of 4 classes have no image in the training split: 0; labels count from 0" in caplog.text
    write_labels(tmp_path / "val.tar", [1, 2, 4])
    with pytest.raises(DataError, match="has images of 1 classes that the training split has none of, such as 4"):
        build_data(folder_config(tmp_path, "DATA.DATASET", "wds/"))


def test_one_class_is_refused_in_training(tmp_path: Path) -> None:
    make_image_folder(tmp_path, train=4, val=2, classes=("dog",))
    with pytest.raises(DataError, match="only one class, dog; a classifier needs two"):
        build_data(folder_config(tmp_path))
    assert build_data(folder_config(tmp_path, "EVAL_MODE", "True")).classes == ["dog"]


def test_classes_without_training_images(zipped_folder: Path, tmp_path: Path) -> None:
    for path in zipped_folder.iterdir():
        shutil.copy(path, tmp_path)
    lines = (tmp_path / "train_map.txt").read_text().splitlines(keepends=True)
    (tmp_path / "train_map.txt").write_text("".join(line for line in lines if line.startswith("cat")))
    with pytest.raises(DataError, match="has images of 1 classes that the training split has none of, such as dog"):
        build_data(folder_config(tmp_path, "DATA.ZIP_MODE", "True"))


@pytest.mark.parametrize("policy", ["rand-m10-n2-inc1", "original-mstd0.5", "v0-mstd0.5", "augmix-m10", "3a"])
def test_every_policy_runs_at_its_highest_magnitude(image_folder: Path, policy: str) -> None:
    """timm's posterize asks for 0 bits there, which new versions of Pillow refuse."""
    loader = build_data(folder_config(image_folder, "AUG.AUTO_AUGMENT", policy)).train
    assert loader is not None
    for epoch in range(8):
        loader.set_epoch(epoch)
        for images, _ in loader:
            assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("place", "device", "policy", "is_on_device"),
    [
        ("auto", "cuda", "rand-m9-mstd0.5-inc1", True),
        ("auto", "cuda", "augmix-m3-w3", False),
        ("auto", "cpu", "rand-m9-mstd0.5-inc1", False),
        ("cpu", "cuda", "rand-m9-mstd0.5-inc1", False),
    ],
)
def test_where_images_are_augmented(place: str, device: str, policy: str, is_on_device: bool) -> None:
    config = load_config(
        "cfgs/mlla_t.yaml", ["DATA.AUGMENT_ON", place, "AUG.AUTO_AUGMENT", policy, "AUG.COLOR_JITTER", "0"]
    )
    transform = train_transform(config, torch.device(device))
    assert (transform.recorded_policy is not None) == is_on_device


def test_images_that_a_gpu_decodes_are_augmented_there() -> None:
    config = load_config("cfgs/mlla_t.yaml", ["DATA.DECODE_ON", "gpu"])
    assert train_transform(config, torch.device("cuda")).recorded_policy is not None


def test_augmentation_on_a_gpu_needs_one(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"^DATA\.AUGMENT_ON gpu: this process trains on cpu; set it to cpu or auto"):
        build_data(folder_config(image_folder, "DATA.AUGMENT_ON", "gpu"))


def test_an_unknown_augmentation_policy(image_folder: Path) -> None:
    with pytest.raises(DataError, match="timm cannot read this policy"):
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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["augmenting", "resizing", "erasing", "exactly_resizing"]),
        ({"AUG.REPROB": 0.0, "DATA.EXACT_EVAL": False}, ["augmenting", "resizing"]),
        ({"DATA.AUGMENT_ON": "cpu"}, ["erasing", "exactly_resizing"]),
    ],
)
def test_kernels_of_a_run_on_a_gpu(settings: dict[str, Any], expected: list[str]) -> None:
    config = load_config("cfgs/mlla_t.yaml", flags=settings)
    assert kernels_in_use(config, torch.device("cpu")) == []
    assert [name.partition(":")[2] for name in kernels_in_use(config, torch.device("cuda"))] == expected

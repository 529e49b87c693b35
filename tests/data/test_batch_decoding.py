"""JPEGs that the device decodes, against those that workers decode; on a CPU as a stand-in for the GPU."""

import os
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import main
from config import load_config
from data import batch_decoding, build_data, make_zip, prefetch
from data.batch_crops import Crop, pack_bytes, resize_crops
from data.batch_decoding import check_support, decode_in_groups, device_jpeg
from data.build import open_split, train_transform
from data.dataset import ImageDataset, keep_batch
from data.decoding import decode_fast, image_to_tensor
from data.errors import BrokenImageError, DataError
from data.prefetch import DeviceLoader
from data.samplers import SampleKey, TrainSampler
from data.workers import RestartingDataLoader
from tests.data.sources.test_webdataset_shards import write_shards
from tests.data.test_decoding import BROKEN, JPEG, WHOLE
from tests.helpers import encoded, make_image_folder, photo
from utils.config.errors import ConfigError

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=needs_gpu)]
OPTS = ["DATA.IMG_SIZE", "32", "AUG.SCALE", "[0.08,1.0]", "DATA.BATCH_SIZE", "4", "DATA.AUGMENT_ON", "gpu"]
FOR_THE_DEVICE = {
    "JPEG": JPEG,
    "full chroma": WHOLE["full chroma"],
    "4:2:2": encoded(photo(97, 61), subsampling="4:2:2"),
    "EXIF-rotated": WHOLE["EXIF-rotated"],
    "after the end": WHOLE["after the end"],
    "restart markers": encoded(photo(97, 61), restart_marker_blocks=2),
    "1x1": WHOLE["1x1"],
}
NO_TABLES = JPEG.replace(b"\xff\xdb", b"\xff\xfe")  # comments in the place of the quantization tables


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decoded_on(device: torch.device, data: bytes) -> Tensor:
    """Decode with libjpeg-turbo as a device does, to pixels (H, W, 3).

    Where chroma has fewer pixels, nvJPEG repeats them, and libjpeg interpolates unless told otherwise: the pixels of
    `photo` differ by 2 levels on average with 4:2:2, and by 3 with 4:2:0.
    """
    if device.type == "cpu":
        return decode_fast(data)
    simplejpeg = pytest.importorskip("simplejpeg")
    return torch.from_numpy(simplejpeg.decode_jpeg(data, fastupsample=True))


def mean_difference(pixels: Tensor, expected: Tensor) -> float:
    """Return the mean difference, in levels of 255, of decoded pixels (3, H, W) from the expected ones (H, W, 3)."""
    return (pixels.permute(1, 2, 0).cpu().int() - expected.int()).abs().float().mean().item()


@pytest.mark.parametrize("kind", FOR_THE_DEVICE)
@pytest.mark.parametrize("device", DEVICES)
def test_usual_jpegs_are_decoded_on_the_device(kind: str, device: torch.device) -> None:
    data = FOR_THE_DEVICE[kind]
    expected = decoded_on(device, data)
    assert device_jpeg(data) == (data, *expected.shape[:2])
    (pixels,) = decode_in_groups([as_tensor(data)], [expected[..., 0].numel()], device)
    assert pixels.device.type == device.type
    assert mean_difference(pixels, expected) < 1


@pytest.mark.parametrize("kind", sorted({*WHOLE, "RGB", "large"} - {*FOR_THE_DEVICE}))
def test_other_images_are_left_to_the_workers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_decoding, "MAX_IMAGE_PIXELS", 97 * 61)
    others = {"RGB": encoded(photo(97, 61), keep_rgb=True), "large": encoded(photo(97, 62))}
    assert device_jpeg((WHOLE | others)[kind]) is None


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_do_not_reach_the_device(kind: str) -> None:
    is_cut_off = kind in ("cut off", "two bytes short", "zeros after the middle")
    with pytest.raises(BrokenImageError, match="cut off") if is_cut_off else nullcontext():
        assert device_jpeg(BROKEN[kind][0]) is None


def test_groups_are_bounded_and_what_the_device_rejects_is_decoded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [encoded(photo(40 + i, 30, i)) for i in range(9)]
    calls: list[int] = []

    def decode(jpegs: list[Tensor], *_: Any) -> list[Tensor]:
        calls.append(len(jpegs))
        if any(len(jpeg) == len(files[4]) for jpeg in jpegs):
            raise RuntimeError("not supported")
        return [torch.zeros(3, 1, 1)] * len(jpegs)

    monkeypatch.setattr(batch_decoding, "decode_jpeg", decode)
    monkeypatch.setattr(batch_decoding, "MAX_GROUP_PIXELS", 4 * 40 * 30)
    images = list(decode_in_groups([as_tensor(file) for file in files], [1200] * 9, CPU))
    assert calls == [3, 4, 1, 1, 1, 1, 2]
    assert [tuple(image.shape) for image in images[3:6]] == [(3, 1, 1), (3, 30, 44), (3, 1, 1)]
    assert images[4].permute(1, 2, 0).equal(decode_fast(files[4]))


@pytest.mark.parametrize("device", DEVICES)
def test_crops_of_jpegs_and_of_pixels(device: torch.device) -> None:
    images = [photo(90, 61), photo(70, 80, 1), photo(64, 64, 2)]
    boxes = [(5, 20, 40, 50), (0, 0, 80, 70), (10, 3, 30, 30)]
    parts, crops, cut, whole = [], [], [], []
    for index, (image, (top, left, height, width)) in enumerate(zip(images, boxes, strict=True)):
        pixels = image_to_tensor(image)[top : top + height, left : left + width]
        file = as_tensor(encoded(image, quality=98, subsampling=0))
        is_jpeg = index != 1
        parts.append(file if is_jpeg else pixels)
        place = (image.width * image.height, top, left) if is_jpeg else (0, 0, 0)
        crops.append(Crop(parts[-1].numel(), *place, height, width, 32, True, index == 2))
        cut.append(pixels)
        whole.append(Crop(pixels.numel(), 0, 0, 0, *crops[-1][4:]))
    expected = resize_crops(pack_bytes(cut), torch.tensor(whole), CPU)
    result = resize_crops(pack_bytes(parts), torch.tensor(crops), device).cpu()
    difference = (result.int() - expected.int()).abs()
    assert difference[1].max() <= 1
    assert difference.float().mean() < 1


def loader(folder: Path, *opts: str, share: float, workers: int = 0, device: torch.device = CPU) -> DeviceLoader:
    """Return the training loader that a run has, on any device, which decodes a share of the JPEGs."""
    config = load_config(
        "cfgs/mlla_t.yaml", ["DATA.DATA_PATH", str(folder), *OPTS, "DATA.NUM_WORKERS", str(workers), *opts]
    )
    source = open_split(config, "train")
    sampler = TrainSampler(len(source), rank=0, num_processes=1, seed=0)
    dataset = ImageDataset(
        source,
        train_transform(config, torch.device("cuda")),
        seed=0,
        device_share=share,
        replacements=sampler.order,
    )
    batches = RestartingDataLoader(
        dataset, 4, sampler=sampler, num_workers=workers, collate_fn=keep_batch, generator=torch.Generator()
    )
    return DeviceLoader(batches, device, skip_broken=config.DATA.ON_ERROR == "skip")


@pytest.mark.parametrize("kind", ["folder", "zip", "wds", "hfds"])
def test_draws_do_not_depend_on_where_images_are_decoded(
    image_folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = {"zip": ("DATA.ZIP_MODE", "True"), "wds": ("DATA.DATASET", "wds/shards")}.get(kind, ())
    if kind == "zip":
        assert make_zip.main([str(image_folder), str(tmp_path)]) == 0
    elif kind == "hfds":
        library = pytest.importorskip("datasets")
        monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        shutil.copytree(image_folder / "train", tmp_path / "images" / "train")
        opts = ("DATA.DATASET", "hfds/images")
    elif kind == "wds":
        write_shards(tmp_path / "shards" / "train", "shard")
    folder = image_folder if kind == "folder" else tmp_path
    there, here = (loader(folder, *opts, share=share) for share in (1.0, 0.0))
    for one, other in zip(there.loader, here.loader, strict=True):
        assert one.crops[:, 1].any()
        assert not other.crops[:, 1].any()
        assert one.crops[:, 6:].equal(other.crops[:, 6:])
        assert all(getattr(one, name).equal(getattr(other, name)) for name in ("labels", "operations", "erasures"))
    for (images, labels), (expected, same) in zip(there, here, strict=True):
        assert labels.equal(same)
        assert (images - expected).abs().mean() < 0.02  # in standard deviations


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (["--opts", "DATA.DECODE_ON", "gpu"], None, "32"),
        (["--throughput", "--opts", "BENCHMARK.LOADING", "4"], None, "32"),  # among others with JPEGs on the GPU
        (["--opts", "DATA.DECODE_ON", "gpu"], "8", "8"),
        ([], None, None),
    ],
)
def test_only_a_run_that_decodes_on_the_gpu_has_many_queues(
    arguments: list[str], given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "of this process")  # which gets its value back after the test
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    if given is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
    monkeypatch.setattr(main, "run_task", lambda *_, **__: found.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")))
    main.main(["--cfg", "cfgs/mlla_t.yaml", *arguments])
    assert found == [expected]


def test_which_jpegs_are_decoded_on_the_device_depends_on_the_sample_alone(image_folder: Path) -> None:
    """So do its pixels, in any batch. A larger share has all JPEGs of a smaller one, and more."""
    keys = [SampleKey(epoch, position) for epoch in range(20) for position in range(16)]
    on_device = {}
    for share in (0.25, 0.75):
        loads = loader(image_folder, share=share)
        batch = loads.dataset.__getitems__(keys)
        on_device[share] = batch.crops[:, 1] > 0
        part = loads.dataset.__getitems__(keys[7:9])
        assert part.crops.equal(batch.crops[7:9])
        assert loads.prepare(part)[0].equal(loads.prepare(batch)[0][7:9])
        assert on_device[share].float().mean().item() == pytest.approx(share, abs=0.08)
    assert (on_device[0.25] <= on_device[0.75]).all()


@pytest.fixture
def _in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are prepared ahead and in a thread, as for a GPU."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(prefetch, "wait_for_batch", lambda *_: None)
    monkeypatch.setattr(DeviceLoader, "is_idle", lambda _: False)
    start = DeviceLoader.__init__

    def with_stream(self: DeviceLoader, *args: Any, **settings: Any) -> None:
        start(self, *args, **settings)
        self.stream = torch.cuda.Stream(self.device)

    monkeypatch.setattr(DeviceLoader, "__init__", with_stream)


@pytest.mark.parametrize(("workers", "fixture"), [(0, "tmp_path"), (1, "tmp_path"), (1, "_in_a_thread")])
def test_broken_jpegs_are_found_by_the_device_named_and_replaced(
    request: pytest.FixtureRequest, tmp_path: Path, workers: int, fixture: str, caplog: pytest.LogCaptureFixture
) -> None:
    request.getfixturevalue(fixture)
    make_image_folder(tmp_path, train=8, val=1)
    (tmp_path / "train" / "cat" / "3.jpg").write_bytes(NO_TABLES)
    assert device_jpeg(NO_TABLES) is not None
    with pytest.raises(
        BrokenImageError, match=r"^\S*/cat/3\.jpg: cannot be decoded: .*; repair it, or set DATA\.ON_ER"
    ):
        list(loader(tmp_path, share=1.0, workers=workers))
    there, here = (loader(tmp_path, "DATA.ON_ERROR", "skip", share=share, workers=workers) for share in (1.0, 0.0))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for (images, labels), (expected, same) in zip(there, here, strict=True):
        assert labels.equal(same)
        assert (images - expected).abs().mean() < 0.02
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert [message.partition(": ")[0] for message in caplog.messages] == [f"skipped {tmp_path}/train/cat/3.jpg"] * 2


def test_refusals(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opts = ["DATA.DATA_PATH", str(image_folder), "DATA.DECODE_ON", "gpu"]
    with pytest.raises(ConfigError, match=r"^DATA\.DECODE_ON.* leave out DATA\.AUGMENT_ON cpu"):
        load_config("cfgs/mlla_t.yaml", [*opts, "DATA.AUGMENT_ON", "cpu"])
    for place, key in (("gpu", "AUGMENT_ON gpu"), ("auto", "DECODE_ON gpu")):
        with pytest.raises(DataError, match=rf"^DATA\.{key}: this process trains on cpu; set it to cpu"):
            build_data(load_config("cfgs/mlla_t.yaml", [*opts, "DATA.AUGMENT_ON", place]))
    config = load_config("cfgs/mlla_t.yaml", [*opts, "AUG.AUTO_AUGMENT", "augmix-m3-w3"])
    with pytest.raises(DataError, match=r"^DATA\.DECODE_ON gpu: set it to cpu, since a GPU that decodes augments \("):
        train_transform(config, torch.device("cuda"))
    check_support(CPU)
    monkeypatch.setattr(batch_decoding, "torchvision", SimpleNamespace(__version__="0.99"))
    monkeypatch.setattr(batch_decoding, "decode_jpeg", lambda *_: torch.ops.image.no_such_decoder())
    with pytest.raises(
        DataError, match=r"^DATA\.DECODE_ON gpu: torchvision 0\.99 cannot decode JPEGs .*; set it to cpu"
    ):
        check_support(CPU)


@needs_gpu
@pytest.mark.parametrize("workers", ["0", "2"])
def test_batches_on_a_gpu_are_the_same_in_every_run_and_after_a_resume(image_folder: Path, workers: str) -> None:
    opts = ["DATA.DATA_PATH", str(image_folder), *OPTS, "DATA.NUM_WORKERS", workers, "DATA.DECODE_ON", "gpu"]
    config = load_config("cfgs/mlla_t.yaml", opts)
    first, again, resumed = (build_data(config, device="cuda").train for _ in range(3))
    assert first is not None
    assert again is not None
    assert resumed is not None
    resumed.set_epoch(0, start=8)
    whole = list(first)
    assert len(whole) == 4
    for rest, other in ((whole, again), (whole[2:], resumed)):
        assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(rest, other, strict=True))


@needs_gpu
def test_damaged_pixels_do_not_harm_the_gpu() -> None:
    """It makes up pixels or reports an error; the next file is decoded as before."""
    device = torch.device("cuda")
    rng = np.random.default_rng(0)
    for _ in range(20):
        damaged = np.frombuffer(JPEG, dtype=np.uint8).copy()
        damaged[rng.integers(JPEG.index(b"\xff\xda") + 20, len(JPEG) - 2, 20)] = rng.integers(0, 255, 20)
        try:
            (pixels,) = decode_in_groups([torch.from_numpy(damaged)], [97 * 61], device)
            assert pixels.shape == (3, 61, 97)
        except BrokenImageError:
            pass
    good, again = (next(decode_in_groups([as_tensor(JPEG)], [97 * 61], device)) for _ in range(2))
    assert good.equal(again)
    assert mean_difference(good, decoded_on(device, JPEG)) < 1

"""Batches on the device: normalization, erasing, and images that cannot be used."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import transforms

from data.batch_augmentation import IDENTITY, Kind
from data.dataset import Batch, Failure
from data.decoding import image_to_tensor
from data.errors import BrokenImageError
from data.prefetch import DeviceLoader, Normalizer, Prepared
from data.transforms import denormalize
from tests.helpers import photo

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")),
]


class Batches:
    """A fake DataLoader."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.sampler: object = None
        self.dataset = SimpleNamespace(device_share=0.0)
        self.is_started = False

    def start(self) -> None:
        self.is_started = True

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def batch(*erasures: tuple[int, ...], count: int = 3, failures: tuple[str, ...] = (), seed: int = 0) -> Batch:
    images = (
        torch.stack([image_to_tensor(photo(32, 32, seed + i)) for i in range(count)])
        if count
        else (torch.empty(0, 1, 1, 3, dtype=torch.uint8))
    )
    parts = torch.tensor(erasures, dtype=torch.int64).reshape(-1, 6)
    crops, operations = torch.empty(0, 9, dtype=torch.int64), torch.empty(0, 10, dtype=torch.float64)
    failed = [Failure(name, "is broken") for name in failures]
    keys = torch.zeros(count, 3, dtype=torch.int64)
    return Batch(images, torch.arange(count), crops, operations, parts, failed, seconds=[0.1, 0.5, 0.2], keys=keys)


def loader(*batches: Batch, device: torch.device = CPU, **settings: object) -> DeviceLoader:
    return DeviceLoader(Batches(list(batches)), device, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_images_are_normalized_as_torchvision_does(device: torch.device) -> None:
    reference = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    host = batch()
    ((images, labels),) = loader(host, device=device)
    assert images.device.type == labels.device.type == device.type
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.equal(torch.stack([reference(image.numpy()) for image in host.images]).to(device))
    assert labels.tolist() == [0, 1, 2]
    assert host.images.dtype == torch.uint8
    torch.testing.assert_close(denormalize(images.cpu()), host.images.permute(0, 3, 1, 2) / 255)


MORE_WORKERS = "raise DATA.NUM_WORKERS, which is 3 (2 CPU cores for this process)"
DECODE_THERE = "DATA.DECODE_ON gpu with DATA.AUGMENT_ON gpu"
SHARE = "DATA.GPU_DECODE_SHARE, which is 0.5"


@pytest.mark.parametrize(
    ("seconds", "transform", "share", "device", "remedies"),
    [
        ([0.0, 0.2, 0.0], {"may_move_to_device": True}, 0.0, "cuda", f", or {DECODE_THERE}, or smaller images"),
        ([0.0, 0.2, 0.0], {"recorded_policy": "any"}, 0.0, "cuda", ", or DATA.DECODE_ON gpu, or smaller images"),
        ([0.0, 0.2, 0.0], {"may_move_to_device": True}, 0.0, "cpu", ", or smaller images"),
        ([0.0, 0.2, 0.0], {}, 0.5, "cuda", f", or a higher {SHARE}, or smaller images"),
        ([0.0, 0.2, 0.0], {}, 1.0, "cuda", ", or smaller images"),
        ([0.0, 0.0, 9.0], {"may_move_to_device": True}, 0.0, "cuda", ", or DATA.AUGMENT_ON gpu"),
        ([0.0, 0.0, 9.0], {"may_move_to_device": False}, 0.0, "cuda", ""),
        ([9.0, 0.0, 0.0], {}, 0.0, "cuda", ", or faster storage, or --zip with --cache-mode"),
    ],
)
def test_advice_names_the_slowest_stage_and_what_is_not_yet_in_use(
    seconds: list[float],
    transform: dict[str, object],
    share: float,
    device: str,
    remedies: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.workers.share_of_cores", lambda: 2)
    slow = loader(batch(), batch()._replace(seconds=seconds))
    slow.loader.num_workers = 3
    slow.loader.dataset.transform = SimpleNamespace(**transform)  # type: ignore[attr-defined]
    slow.loader.dataset.device_share = share  # type: ignore[attr-defined]
    list(slow)
    slow.device_seconds = 0.0
    slow.device = torch.device(device)
    assert slow.advice().partition("; ")[2] == MORE_WORKERS + remedies
    shares = {0.2: "70% decoding, 20% transforming, 10% reading"}
    assert slow.advice().startswith(f"loading is {shares.get(seconds[1], '')}")


def test_advice_is_to_decode_elsewhere_where_the_device_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    late = loader(batch(), batch())
    late.loader.dataset.device_share = 0.5  # type: ignore[attr-defined]
    prepare = late.prepare_ahead
    monkeypatch.setattr(late, "prepare_ahead", lambda batch: (time.sleep(0.02), prepare(batch))[1])
    monkeypatch.setattr("data.prefetch.SameThread", lambda: ThreadPoolExecutor(1))
    list(late)
    assert late.advice().endswith(f"; lower {SHARE}, or set DATA.DECODE_ON cpu")
    late.loader.batches = []  # type: ignore[attr-defined]
    list(late)
    late.loader.num_workers = 3
    late.loader.dataset.transform = SimpleNamespace()  # type: ignore[attr-defined]
    assert "DATA.DECODE_ON" not in late.advice()


@pytest.mark.parametrize("device", DEVICES)
def test_operations_are_applied_before_normalization(device: torch.device) -> None:
    host = batch()
    ((expected, _),) = loader(host._replace(images=255 - host.images), device=device)
    rows = torch.tensor([(index, 0, Kind.INVERT, 0.0, *IDENTITY) for index in range(3)], dtype=torch.float64)
    ((images, _),) = loader(host._replace(operations=rows), device=device)
    assert images.equal(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_fills_the_boxes_and_nothing_else(device: torch.device, mode: str) -> None:
    ((clean, _),) = loader(batch(), device=device)
    ((erased, _),) = loader(batch((1, 4, 6, 20, 11, 99), (2, 0, 0, 3, 3, 5)), device=device, erase_mode=mode)
    boxes = torch.zeros(3, 1, 32, 32, dtype=torch.bool, device=device)
    boxes[1, :, 4:24, 6:17] = boxes[2, :, :3, :3] = True
    assert erased.equal(torch.where(boxes, erased, clean))
    inside = erased[1, :, 4:24, 6:17]
    if mode == "const":
        assert (inside == 0).all()
    elif mode == "rand":
        assert len(inside.unique()) == 3
        assert (inside == inside[:, :1, :1]).all()
    else:
        assert len(inside.unique()) > 600
        assert abs(inside.mean().item()) < 0.15
        assert abs(inside.std().item() - 1) < 0.15


@pytest.mark.parametrize("device", DEVICES)
def test_noise_depends_on_the_sample_and_not_on_the_batch(device: torch.device) -> None:
    ((alone, _),) = loader(batch((0, 4, 6, 20, 11, 99)), device=device)
    among = loader(batch((1, 0, 0, 9, 9, 1), seed=5), batch((0, 1, 1, 8, 8, 3), (2, 4, 6, 20, 11, 99)), device=device)
    (_, _), (last, _) = among
    assert last[2, :, 4:24, 6:17].equal(alone[0, :, 4:24, 6:17])
    ((other, _),) = loader(batch((0, 4, 6, 20, 11, 98)), device=device)
    assert not other.equal(alone)


@pytest.mark.parametrize("device", DEVICES)
def test_all_batches_come_in_order(device: torch.device) -> None:
    hosts = [batch((0, 0, 0, 5, 5, seed), seed=10 * seed) for seed in range(5)]
    prefetched = list(loader(*hosts, device=device))
    singly = [next(iter(loader(host, device=device))) for host in hosts]
    assert len(prefetched) == 5
    assert all(a.equal(b) for (a, _), (b, _) in zip(prefetched, singly, strict=True))
    assert list(loader(device=device)) == []


def test_an_idle_device_gets_the_next_batch_before_another_one_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [batch(count=count) for count in range(1, 6)]
    prefetched, prepared = loader(*hosts), []

    def prepare_ahead(host: Batch) -> Prepared:
        prepared.append(len(host.labels))
        return Prepared(host.images, host.labels, None)

    monkeypatch.setattr(prefetched, "stream", object())
    monkeypatch.setattr(prefetched, "prepare_ahead", prepare_ahead)
    batches = iter(prefetched)
    for is_idle, count, num_prepared in ((True, 1, 1), (False, 2, 3), (True, 3, 3), (True, 4, 4), (False, 5, 5)):
        monkeypatch.setattr(prefetched, "is_idle", lambda is_idle=is_idle: is_idle)
        assert len(next(batches)[1]) == count
        assert prepared == list(range(1, num_prepared + 1))
    assert list(batches) == []


def test_the_first_broken_image_stops_the_run_unless_skipped() -> None:
    batches = iter(loader(batch(), batch(failures=("cat/3.jpg",))))
    next(batches)
    with pytest.raises(BrokenImageError, match=r"^cat/3\.jpg: is broken; repair it, or set DATA\.ON_ERROR to skip$"):
        next(batches)


def test_skipped_images_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    skipping = loader(
        batch(failures=("a", "b")),
        batch(failures=("b",)),
        batch(count=0, failures=("a",)),
        skip_broken=True,
        max_broken=2,
    )
    with caplog.at_level(logging.WARNING, logger="mlla"):
        assert [len(labels) for _, labels in skipping] == [3, 3]  # a batch without images is none
        assert [len(labels) for _, labels in skipping] == [3, 3]  # another epoch
    assert [record.message for record in caplog.records] == ["skipped a: is broken", "skipped b: is broken"]
    skipping.loader.batches.append(batch(failures=("c",)))  # type: ignore[attr-defined]
    with pytest.raises(
        BrokenImageError, match=r"DATA\.MAX_BAD 2: 3 images of this process cannot be used, the last is c"
    ):
        list(skipping)


def test_normalizer_takes_any_memory_order() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4), dtype=np.uint8))
    assert Normalizer()(images).equal(Normalizer()(images.contiguous(memory_format=torch.channels_last)))


def test_workers_begin_before_the_first_batch_is_asked_for() -> None:
    batches = loader(batch())
    iterator = iter(batches)
    assert batches.loader.is_started  # type: ignore[attr-defined]
    assert len(list(iterator)) == 1

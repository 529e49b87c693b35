"""Batches by sample keys: reproducible random draws, and images that cannot be used."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from data.batch_augmentation import IDENTITY, Kind, Operation
from data.dataset import Batch, ImageDataset, keep_batch, kept_generators, seed_generators
from data.errors import BrokenImageError
from data.samplers import EvalSampler, SampleKey, TrainSampler
from data.transforms import Erasure, EvalTransform, Sample
from tests.helpers import encoded, photo


class NumberedImages:
    """Encoded images whose first value is about their index; those in `broken` are truncated or cannot be read."""

    classes = ("even", "odd")  # type: ignore[assignment]

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.labels = [index % 2 for index in range(count)]
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        if index in self.broken and index % 2:
            raise BrokenImageError("cannot be read")
        data = encoded(Image.new("RGB", (8, 8), (index, 0, 0)), "PNG")
        return data[:40] if index in self.broken else data


def first_value(image: Tensor) -> Sample:
    """The image's index, a draw from each generator, an operation and an erasure with such draws."""
    draws = [random.random(), float(np.random.rand()), torch.rand(1).item()]
    erased = [Erasure(0, 0, 1, 1, random.getrandbits(62))] if draws[0] < 0.5 else []
    operations = [Operation(Kind.BRIGHTNESS, random.random(), *IDENTITY)] if draws[1] < 0.5 else []
    return Sample(torch.tensor([[[float(image[0, 0, 0]), *draws]]]), None, operations, erased)


def dataset(count: int = 40, broken: tuple[int, ...] = (), **settings: object) -> ImageDataset:
    return ImageDataset(NumberedImages(count, broken), first_value, 7, **settings)  # type: ignore[arg-type]


def batches(data: ImageDataset, sampler: TrainSampler | EvalSampler, workers: int, batch_size: int = 4) -> list[Batch]:
    return list(DataLoader(data, batch_size, sampler=sampler, num_workers=workers, collate_fn=keep_batch))


def same(one: Batch, other: Batch) -> bool:
    return all(a.equal(b) for a, b in zip(one[:5], other[:5], strict=True)) and one.failures == other.failures


def images_of(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].int().tolist()


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_the_same_for_any_number_of_workers(workers: int) -> None:
    sampler = TrainSampler(40, rank=0, num_processes=1, seed=0)
    data = dataset(broken=(3, 4, 17), replacements=sampler.order)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected = batches(data, sampler, 0)
        assert sum(len(batch.failures) for batch in expected) >= 3
        assert all(same(*pair) for pair in zip(expected, batches(data, sampler, workers), strict=True))


def test_a_resumed_epoch_gives_the_rest_of_the_whole_one() -> None:
    sampler = TrainSampler(40, rank=1, num_processes=2, seed=0)
    data = dataset(broken=(8,), replacements=sampler.order)
    sampler.set_epoch(2)
    whole = batches(data, sampler, 0)
    sampler.set_epoch(2, start=8)
    assert all(same(*pair) for pair in zip(whole[2:], batches(data, sampler, 1), strict=True))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    data = dataset()
    keys = [SampleKey(3, slot, slot) for slot in range(12)]
    together = data.__getitems__(keys)
    reverse = data.__getitems__(keys[::-1])
    assert together.images.equal(reverse.images.flip(0))
    for name in ("operations", "erasures"):
        draws = {int(row[0]): row[1:].tolist() for row in getattr(together, name)}
        assert draws == {11 - int(row[0]): row[1:].tolist() for row in getattr(reverse, name)}
        assert 0 < len(draws) < 12
    other_epoch = data.__getitems__([SampleKey(4, slot, slot) for slot in range(12)])
    assert (together.images[..., 1:] != other_epoch.images[..., 1:]).all()


def test_the_next_good_image_of_the_order_replaces_a_broken_one() -> None:
    order = np.array([5, 3, 4, 2, 0, 1])
    data = dataset(6, broken=(3, 4, 1), replacements=lambda _: order)
    keys = [SampleKey(0, int(image), slot) for slot, image in enumerate(order)]
    batch = data.__getitems__(keys)
    assert images_of(batch) == [5, 2, 2, 2, 0, 5]  # after the last comes the first
    assert batch.labels.tolist() == [1, 0, 0, 0, 0, 1]
    assert len(batch.images[:, 0, 0, 1].unique()) == 6  # each with draws of its own
    names = [failure.name for failure in batch.failures]
    assert names == ["image 3", "image 4", "image 4", "image 1"]
    assert {failure.reason for failure in batch.failures if failure.name != "image 4"} == {"cannot be read"}


def test_in_evaluation_a_broken_image_is_not_replaced() -> None:
    batch = dataset(6, broken=(3, 4)).__getitems__([SampleKey(0, index, index) for index in range(6)])
    assert images_of(batch) == [0, 1, 2, 5]
    assert [failure.name for failure in batch.failures] == ["image 3", "image 4"]


def test_it_gives_up_after_max_failures_broken_images() -> None:
    order = np.arange(30)
    data = dataset(30, broken=tuple(range(30)), replacements=lambda _: order, max_failures=5)
    batch = data.__getitems__([SampleKey(0, 0, 0)])
    assert len(batch.labels) == len(batch.images) == 0
    assert len({failure.name for failure in batch.failures}) == 6


def test_exact_and_fast_decoding_feed_the_transform() -> None:
    source = NumberedImages(2)
    source.read = lambda index: encoded(photo(60, 50, index))  # type: ignore[method-assign]
    exact, fast = (
        ImageDataset(source, EvalTransform(32, crop=True, interpolation="bicubic"), 0, is_exact=is_exact)  # type: ignore[arg-type]
        for is_exact in (True, False)
    )
    keys = [SampleKey(0, 0, 0), SampleKey(0, 1, 1)]
    difference = exact.__getitems__(keys).images.int() - fast.__getitems__(keys).images.int()
    assert 0 < difference.abs().max() <= 1


def test_generators_are_seeded_and_restored() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    with kept_generators():
        seed_generators(0, 1, 2)
        first = [random.random(), np.random.rand(), torch.rand(1).item()]
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == expected
    with kept_generators():
        seed_generators(0, 1, 2)
        assert [random.random(), np.random.rand(), torch.rand(1).item()] == first
    with kept_generators():
        seed_generators(0, 1, 3)
        assert [random.random(), np.random.rand(), torch.rand(1).item()] != first

"""Dataset of transformed images, which loader workers read in batches by sample key."""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from data.batch_crops import Crop, pack_bytes, whole_crop
from data.batch_decoding import DeviceJpeg, device_jpeg
from data.decoding import decode_fast, decode_pillow, image_to_tensor
from data.errors import BrokenImageError
from data.exact_crops import ExactCrop, whole_exact_crop
from data.samplers import SampleKey
from data.seeds import sample_seeds
from data.transforms import EvalTransform, Transform

WHOLE: dict[type, Callable[[Tensor], Crop | ExactCrop]] = {Crop: whole_crop, ExactCrop: whole_exact_crop}
STAGES = ("reading", "decoding", "transforming")


class ImageSource(Protocol):
    """Labeled images by index, encoded or as RGB images, and the class names."""

    classes: list[str]

    @property
    def labels(self) -> Sequence[int] | np.ndarray: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return where the image is, for messages."""

    def read(self, index: int) -> bytes | Image.Image | Tensor:
        """Read an image: encoded, or RGB pixels, as a tensor (H, W, 3), uint8.

        Raises:
            BrokenImageError: it cannot be read.
        """


class Failure(NamedTuple):
    """An image that could not be used."""

    name: str
    reason: str


class Batch(NamedTuple):
    """A batch as a worker returns it."""

    images: Tensor  # (B, H, W, 3) uint8, or (bytes,): what the crops are made from, one after the other
    labels: Tensor  # (B,) int64
    crops: Tensor  # (B, 9) int64: fields of each Crop, or (B, 13) of each ExactCrop; (0, 9) if all images are finished
    operations: Tensor  # (O, 10) float64: image, place in its order, and fields of each operation to apply
    erasures: Tensor  # (E, 6) int64: image, top, left, height, width and seed of each box to erase
    failures: list[Failure]
    seconds: list[float]  # that the worker spent on each of STAGES
    keys: Tensor  # (K, 3) int64: the fields of each key that was asked for

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle small tensors as arrays: as a tensor, each would get a file in shared memory, 0.1 ms on both sides."""
        arrays = [value.numpy() if isinstance(value, Tensor) else value for value in self[1:]]
        return from_arrays, (self.images, *arrays)


def from_arrays(*values: Any) -> Batch:
    """Return a batch, of which arrays become tensors again."""
    restored: list[Any] = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    return Batch(*restored)


class ImageDataset(Dataset[Batch]):
    """Batches by lists of sample keys. All random draws of a sample depend on (seed, epoch, position) only.

    Args:
        source: images and labels.
        transform: makes a sample from a decoded image.
        seed: seed of all random draws.
        is_exact: decode with Pillow and give the transform an image; else decode faster and give it a tensor.
        device_share: probability that the transform gets a JPEG that the device can decode as it is.
        replacements: function that returns the order of an epoch, in which the next good image replaces a broken one;
            the random draws stay those of the sample. None: the batch gets smaller. The batch lists the failures.
        max_failures: replacements to try in a row.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        seed: int,
        *,
        is_exact: bool = False,
        device_share: float = 0.0,
        replacements: Callable[[int], np.ndarray] | None = None,
        max_failures: int = 100,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.is_exact = is_exact
        self.device_share = device_share
        self.replacements = replacements
        self.max_failures = max_failures

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        with kept_generators():
            return self.load(keys)

    def load(self, keys: Sequence[SampleKey]) -> Batch:
        """Return a batch, after which the generators are in another state."""
        pixels: list[Tensor] = []
        labels: list[int] = []
        crops: list[Crop | ExactCrop | None] = []
        operations: list[tuple[float, ...]] = []
        erasures: list[tuple[int, ...]] = []
        failures: list[Failure] = []
        seconds = [0.0] * len(STAGES)
        seeds = sample_seeds([(self.seed, key.epoch, key.position) for key in keys])
        for key, (*seeds_of_sample, draw) in zip(keys, seeds, strict=True):
            on_device = draw < self.device_share * 2**32
            for index in self.candidates(key):
                start = time.perf_counter()
                try:
                    content = self.source.read(index)
                    was_read = time.perf_counter()
                    image = self.decode(content, on_device=on_device)
                    was_decoded = time.perf_counter()
                except BrokenImageError as error:
                    failures.append(Failure(self.source.name(index), str(error)))
                    continue
                seed_generators(*seeds_of_sample)
                sample = self.transform(image)
                seconds[0] += was_read - start
                seconds[1] += was_decoded - was_read
                seconds[2] += time.perf_counter() - was_decoded
                crops.append(sample.crop)
                operations += [(len(pixels), place, *op) for place, op in enumerate(sample.operations)]
                erasures += [(len(pixels), *box) for box in sample.erasures]
                pixels.append(sample.pixels)
                labels.append(int(self.source.labels[index]))
                break
        kind = type(next(filter(None, crops), None))
        rows = [crop or WHOLE[kind](image) for crop, image in zip(crops, pixels, strict=True)] if kind in WHOLE else []
        collate = pack_bytes if rows else default_collate
        return Batch(
            collate(pixels) if pixels else torch.empty(0, 1, 1, 3, dtype=torch.uint8),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(rows, dtype=torch.int64).reshape(-1, len(rows[0] if rows else Crop._fields)),
            torch.tensor(operations, dtype=torch.float64).reshape(-1, 10),
            torch.tensor(erasures, dtype=torch.int64).reshape(-1, 6),
            failures,
            seconds,
            torch.tensor(keys, dtype=torch.int64),
        )

    def candidates(self, key: SampleKey) -> Iterator[int]:
        """Yield the image of a key, then its possible replacements."""
        yield key.position
        if self.replacements is not None:
            order = self.replacements(key.epoch)
            for step in range(1, min(len(order), self.max_failures + 1)):
                yield int(order[(key.slot + step) % len(order)])

    def without_device(self) -> "ImageDataset":
        """Return the same dataset, which decodes all images itself, and for evaluation also resizes them."""
        changed = copy.copy(self)
        changed.device_share = 0.0
        if isinstance(self.transform, EvalTransform):
            changed.transform = copy.copy(self.transform)
            changed.transform.on_device = False
        return changed

    def decode(self, content: bytes | Image.Image | Tensor, *, on_device: bool) -> Image.Image | Tensor | DeviceJpeg:
        """Return an image in the form that the transform takes."""
        if isinstance(content, bytes):
            if on_device and (jpeg := device_jpeg(content)) is not None:
                return jpeg
            return decode_pillow(content) if self.is_exact else decode_fast(content)
        if isinstance(content, Tensor):
            return Image.fromarray(content.numpy()) if self.is_exact else content
        return content if self.is_exact else image_to_tensor(content)


def keep_batch(batch: Any) -> Any:
    """Return the batch: the collate function for datasets that make batches themselves."""
    return batch


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's CPU generators afterwards, but not in workers, where nothing
    else draws.
    """
    is_worker = get_worker_info() is not None
    states = None if is_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def seed_generators(python: int, numpy: int, torch_cpu: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators."""
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torch_cpu)  # torch.manual_seed would reseed GPUs too

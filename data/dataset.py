"""Batches of transformed images by sample key: what a loader's worker does."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from data.decoding import decode_fast, decode_pillow, image_to_tensor
from data.errors import BrokenImageError
from data.samplers import SampleKey
from data.transforms import Transform


class ImageSource(Protocol):
    """Labeled images by index, encoded or as RGB images, with the names of the classes."""

    classes: list[str]

    @property
    def labels(self) -> Sequence[int] | np.ndarray: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the image is, for messages."""

    def read(self, index: int) -> bytes | Image.Image:
        """Raises BrokenImageError where it cannot be read."""


class Failure(NamedTuple):
    """An image that could not be used."""

    name: str
    reason: str


class Batch(NamedTuple):
    """What a worker hands over."""

    images: Tensor  # (B, H, W, 3) uint8
    labels: Tensor  # (B,) int64
    erasures: Tensor  # (E, 6) int64: image, top, left, height, width and seed of each part to erase
    failures: list[Failure]


class ImageDataset(Dataset[Batch]):
    """Batches by lists of keys. All draws of a sample come from (seed, epoch, position) and from nothing else.

    An image that cannot be used is named in the batch, which is then one short.

    Args:
        source: encoded images.
        transform: makes (H, W, 3) pixels of a decoded image, and says what to erase later.
        seed: of all draws.
        is_exact: decode with Pillow rather than by the faster way; the transform gets an image, else a tensor.
        replacements: the order of an epoch, from which the next good image takes the place of one that cannot be used
            (the draws stay those of the place). None: nothing takes its place.
        max_failures: images in a row to try before giving up.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        seed: int,
        *,
        is_exact: bool = False,
        replacements: Callable[[int], np.ndarray] | None = None,
        max_failures: int = 100,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.is_exact = is_exact
        self.replacements = replacements
        self.max_failures = max_failures

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        pixels: list[Tensor] = []
        labels: list[int] = []
        erasures: list[tuple[int, ...]] = []
        failures: list[Failure] = []
        for key in keys:
            for index in self.candidates(key):
                try:
                    image = self.decode(index)
                except BrokenImageError as error:
                    failures.append(Failure(self.source.name(index), str(error)))
                    continue
                with random_state_of(self.seed, key.epoch, key.position):
                    transformed, erased = self.transform(image)
                erasures += [(len(pixels), *part) for part in erased]
                pixels.append(transformed)
                labels.append(int(self.source.labels[index]))
                break
        images = default_collate(pixels) if pixels else torch.empty(0, 1, 1, 3, dtype=torch.uint8)  # (B, H, W, 3)
        parts = torch.tensor(erasures, dtype=torch.int64).reshape(-1, 6)
        return Batch(images, torch.tensor(labels, dtype=torch.int64), parts, failures)

    def candidates(self, key: SampleKey) -> Iterator[int]:
        """The image of a key, then those that may take its place."""
        yield key.position
        if self.replacements is not None:
            order = self.replacements(key.epoch)
            for step in range(1, min(len(order), self.max_failures + 1)):
                yield int(order[(key.place + step) % len(order)])

    def decode(self, index: int) -> Image.Image | Tensor:
        """A decoded image as the transform takes it."""
        content = self.source.read(index)
        if isinstance(content, bytes):
            return decode_pillow(content) if self.is_exact else decode_fast(content)
        return content if self.is_exact else image_to_tensor(content)


def keep_batch(batch: Any) -> Any:
    """The collate function of a loader whose data set makes batches itself."""
    return batch


@contextmanager
def random_state_of(*entropy: int) -> Iterator[None]:
    """Within: random, numpy and torch's CPU generator seeded from `entropy`. Afterwards: as they were, but in workers,
    where nothing else draws.
    """
    is_worker = get_worker_info() is not None
    states = None if is_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    seed_generators(*entropy)
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def seed_generators(*entropy: int) -> None:
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would reseed GPUs too

"""Which images a process reads, in which order, and randomness that belongs to the image and not to the reader."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


class SampleKey(NamedTuple):
    """What a sampler hands to the data set: with the epoch in it, workers that live on need not be told of epochs."""

    epoch: int
    position: int


class LabelledImages(Protocol):
    """A source of (PIL image, label) by index, with the names of its classes."""

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class TrainSampler(Sampler[SampleKey]):
    """A process's share of a permutation that (seed, epoch) fixes; every process gets as many images.

    Process r of P takes every P-th image from the r-th on, so that the images of one step are the same for any number
    of processes and accumulation steps with the same global batch.
    """

    def __init__(self, num_samples: int, *, rank: int, num_processes: int, seed: int) -> None:
        self.num_samples = num_samples
        self.rank = rank
        self.num_processes = num_processes
        self.seed = seed
        self.share = num_samples // num_processes
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration gives, less its first `start` images of this process: a run that
        goes on in mid-epoch has consumed them.

        Raises:
            ValueError: an epoch has fewer images.
        """
        if not 0 <= start <= self.share:
            raise ValueError(f"start {start}: an epoch has {self.share} images for this process")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.share - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        mine = order[self.rank :: self.num_processes][self.start : self.share]
        return (SampleKey(self.epoch, int(position)) for position in mine)


class EvalSampler(Sampler[SampleKey]):
    """Every P-th image from the r-th on: each image once over all processes, none repeated to make shares even."""

    def __init__(self, num_samples: int, *, rank: int, num_processes: int) -> None:
        self.positions = range(rank, num_samples, num_processes)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(0, position) for position in self.positions)


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """(transformed image, label) by SampleKey; the transform draws from (seed, epoch, position) and nothing else."""

    def __init__(self, images: LabelledImages, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        image, label = self.images[key.position]
        with random_state_of(self.seed, key.epoch, key.position):
            return self.transform(image), label


@contextmanager
def random_state_of(*entropy: int) -> Iterator[None]:
    """Within: random, numpy and torch's CPU generator seeded from `entropy`; afterwards: as they were."""
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would reseed GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

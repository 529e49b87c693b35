"""Which images a process reads, and in which order."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """What a sampler hands to the data set: with the epoch in it, workers that live on need not be told of epochs."""

    epoch: int
    position: int  # of the image in the data set
    place: int = 0  # of the image in the order of the epoch


class TrainSampler(Sampler[SampleKey]):
    """A process's share of a permutation that (seed, epoch) fixes; every process gets as many images.

    Process r of P takes every P-th image from the r-th on, so that the images of one step are the same for any number
    of processes and accumulation steps with the same global batch.

    Args:
        num_samples: images of the data set.
        keeps_shard: permute only images r, r + P, r + 2P, ... of the data set, those that the process has in memory,
            rather than all. The processes' shards differ by one image at most; those that have one more leave another
            out in each epoch.
    """

    def __init__(
        self, num_samples: int, *, rank: int, num_processes: int, seed: int, keeps_shard: bool = False
    ) -> None:
        self.num_samples = num_samples
        self.rank = rank
        self.num_processes = num_processes
        self.seed = seed
        self.keeps_shard = keeps_shard
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

    def order(self, epoch: int) -> np.ndarray:
        """The images of an epoch: of all processes, or of this one's shard where it keeps that."""
        if self.keeps_shard:
            shard = np.arange(self.rank, self.num_samples, self.num_processes)
            return np.random.default_rng((self.seed, epoch, self.rank)).permutation(shard)
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)

    def __len__(self) -> int:
        return self.share - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        order = self.order(self.epoch)
        first, step = (0, 1) if self.keeps_shard else (self.rank, self.num_processes)
        places = range(first, len(order), step)[self.start : self.share]
        return (SampleKey(self.epoch, int(order[place]), place) for place in places)


class EvalSampler(Sampler[SampleKey]):
    """Every P-th image from the r-th on: each image once over all processes, none repeated to make shares even."""

    def __init__(self, num_samples: int, *, rank: int, num_processes: int) -> None:
        self.positions = range(rank, num_samples, num_processes)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(0, position, position) for position in self.positions)

"""Samplers: the images that a process reads, and their order."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """Key of a sample. It includes the epoch, so that persistent workers need not be told when an epoch begins."""

    epoch: int
    position: int  # index of the image in the dataset
    slot: int = 0  # index of the image in the order of the epoch


class TrainSampler(Sampler[SampleKey]):
    """A process's share of the permutation given by (seed, epoch); all processes get the same number of images.

    Process r of P takes images r, r + P, r + 2P, ... of the permutation. With the same global batch size, the images of
    a step are thus the same for any number of processes and gradient accumulation steps.

    Args:
        num_samples: number of images in the dataset.
        keeps_shard: permute only images r, r + P, r + 2P, ... of the dataset, which this process has in memory. Shards
            differ in size by one image at most; the larger ones skip one image per epoch, a different one each time.
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
        """Choose the epoch for the next iteration, without this process's first `start` images: a run resumed in
        mid-epoch has consumed them.

        Raises:
            ValueError: the epoch has fewer images for this process.
        """
        if not 0 <= start <= self.share:
            raise ValueError(f"start {start}: an epoch has {self.share} images for this process")
        self.epoch, self.start = epoch, start

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of images in an epoch (N,): of all processes, or of this process's shard."""
        if self.keeps_shard:
            shard = np.arange(self.rank, self.num_samples, self.num_processes)
            return np.random.default_rng((self.seed, epoch, self.rank)).permutation(shard)
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)

    def __len__(self) -> int:
        return self.share - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        order = self.order(self.epoch)
        first, step = (0, 1) if self.keeps_shard else (self.rank, self.num_processes)
        slots = range(first, len(order), step)[self.start : self.share]
        return (SampleKey(self.epoch, int(order[slot]), slot) for slot in slots)


class EvalSampler(Sampler[SampleKey]):
    """Images r, r + P, r + 2P, ... of process r of P: each image once, without padding to equal shares."""

    def __init__(self, num_samples: int, *, rank: int, num_processes: int) -> None:
        self.positions = range(rank, num_samples, num_processes)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(0, position, position) for position in self.positions)

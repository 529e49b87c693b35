"""Samples in the order in which a run takes them; every one's randomness belongs to it and not to its reader."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """An image, and how often it was drawn before: its augmentation follows from both."""

    turn: int
    image: int


class EndlessBatches(Sampler[list[Draw]]):
    """A process's share of an order without end: permutation after permutation of all images, fixed by (seed, turn).

    Process r of P takes every P-th draw from the r-th on, so that the images of one step are the same for any number
    of processes and accumulation steps with the same global batch. Any point of the order can be the start: nothing
    before it is computed but the permutation that it lies in.

    Args:
        num_images: of the data set.
        batch_size: draws in a batch.
        batches_per_epoch: of this process; an epoch is the stretch between two evaluations.
    """

    def __init__(
        self, num_images: int, *, batch_size: int, batches_per_epoch: int, rank: int, num_processes: int, seed: int
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.rank = rank
        self.num_processes = num_processes
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch that the next iteration gives, less its first `start_batch` batches of this process.

        Raises:
            ValueError: an epoch has fewer batches.
        """
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch {start_batch}: an epoch has {self.batches_per_epoch} for this process")
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[Draw]]:
        first = self.epoch * self.batches_per_epoch
        turn, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(first + self.start_batch, first + self.batches_per_epoch):
            draws = []
            for own in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                needed, place = divmod(own * self.num_processes + self.rank, self.num_images)
                if needed != turn:
                    turn, order = needed, np.random.default_rng((self.seed, needed)).permutation(self.num_images)
                draws.append(Draw(turn, int(order[place])))
            yield draws

"""Order of the training images: the same for any number of processes, workers and restarts."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """An image of the dataset's n-th epoch; its augmentation follows from both.

    Attributes:
        epoch: number of whole passes over the dataset before; not an epoch of the trainer.
        image: index of the image.
    """

    epoch: int
    image: int


class EndlessBatches(Sampler[list[Draw]]):
    """This process's batches of an endless order: one permutation of all images after another, fixed by the seed.

    Process r of P takes every P-th draw from the r-th on. So a step has the same images for any number of processes
    and accumulation steps with the same global batch size. Iteration can start anywhere in the order at once.

    Args:
        num_images: images in the dataset.
        batch_size: draws per batch.
        batches_per_epoch: batches of this process between two evaluations.
        rank: this process.
        num_processes: all processes.
        seed: seed of the permutations.
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
        """Choose the epoch that the next iteration yields, without its first `start_batch` batches.

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
        current, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(first + self.start_batch, first + self.batches_per_epoch):
            draws = []
            for own in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                epoch, position = divmod(own * self.num_processes + self.rank, self.num_images)
                if epoch != current:
                    current, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
                draws.append(Draw(epoch, int(order[position])))
            yield draws

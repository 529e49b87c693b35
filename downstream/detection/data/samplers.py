"""Batches of images of similar shape, in an order that follows from seed and epoch."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from data.samplers import SampleKey


class AspectBatches(Sampler[list[SampleKey]]):
    """This process's micro-batches, each step of one shape.

    All images of a step are wider than high, or none is: this saves padding. Only the last step or steps of an epoch
    mix both. A step has the same images for any number of processes and gradient accumulation steps with the same
    global batch size. Images that do not fill a step are dropped, others in each epoch.

    Args:
        aspect_ratios: width over height of each image.
        batch_size: images per micro-batch.
        micro_batches: micro-batches per step on each process (gradient accumulation steps).
        rank: this process.
        num_processes: all processes.
        seed: seed of the order.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float] | np.ndarray,
        *,
        batch_size: int,
        micro_batches: int,
        rank: int,
        num_processes: int,
        seed: int,
    ) -> None:
        self.is_wide = np.asarray(aspect_ratios) > 1
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.rank = rank
        self.num_processes = num_processes
        self.seed = seed
        self.steps = len(self.is_wide) // (batch_size * micro_batches * num_processes)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, without this process's first `start` micro-batches.

        Raises:
            ValueError: an epoch has fewer micro-batches.
        """
        if not 0 <= start <= self.steps * self.micro_batches:
            raise ValueError(f"start {start}: an epoch has {self.steps * self.micro_batches} micro-batches")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.steps * self.micro_batches - self.start

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.is_wide))
        micro_batches = [batch for step in self.steps_of(order) for batch in self.share_of(step)]
        return ([SampleKey(self.epoch, int(p)) for p in batch] for batch in micro_batches[self.start :])

    def steps_of(self, order: np.ndarray) -> list[np.ndarray]:
        """Return the images of each step: full steps of one kind as the order fills them, then the rest."""
        size = self.batch_size * self.micro_batches * self.num_processes
        order = order[: self.steps * size]  # cut now, or the dropped images would always be of the rarer shape
        full, rest = [], []
        for kind in (True, False):
            positions = np.flatnonzero(self.is_wide[order] == kind)
            whole = len(positions) // size * size
            full += list(positions[:whole].reshape(-1, size))
            rest.append(positions[whole:])
        full.sort(key=lambda positions: int(positions[-1]))
        full += list(np.concatenate(rest).reshape(-1, size))
        return [order[positions] for positions in full]

    def share_of(self, step: np.ndarray) -> np.ndarray:
        """Return this process's micro-batches of a step, (micro_batches, batch_size)."""
        return step[self.rank :: self.num_processes].reshape(self.micro_batches, self.batch_size)

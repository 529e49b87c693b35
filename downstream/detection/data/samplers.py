"""Batches of images of like shape, in an order that seed and epoch fix."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from data.samplers import SampleKey


class AspectBatches(Sampler[list[SampleKey]]):
    """A process's micro-batches. All images of a step, over processes and micro-batches, are either wider than high or
    not, so that little is padded; only the last steps of an epoch, of what is left over, mix both.

    A step's images are the same for any number of processes and micro-batches with the same number of images a step.
    Fewer images than a step takes are left out at the end of each epoch, others in each.

    Args:
        aspect_ratios: width over height of each image.
        batch_size: images of a micro-batch.
        micro_batches: of a step on each process.
        rank, num_processes: this process among all.
        seed: of the order.
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
        """Choose the epoch that the next iteration gives, less its first `start` micro-batches of this process.

        Raises:
            ValueError: an epoch has fewer.
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
        """The positions of each step: as soon as enough of a kind have come along the order, then what is left."""
        size = self.batch_size * self.micro_batches * self.num_processes
        order = order[: self.steps * size]  # the others would else always be of the rarer shape
        full, rest = [], []
        for kind in (True, False):
            places = np.flatnonzero(self.is_wide[order] == kind)
            whole = len(places) // size * size
            full += list(places[:whole].reshape(-1, size))
            rest.append(places[whole:])
        full.sort(key=lambda places: int(places[-1]))
        full += list(np.concatenate(rest).reshape(-1, size))
        return [order[places] for places in full]

    def share_of(self, step: np.ndarray) -> np.ndarray:
        """This process's micro-batches of a step, (micro_batches, batch_size)."""
        return step[self.rank :: self.num_processes].reshape(self.micro_batches, self.batch_size)

from itertools import chain

import numpy as np
import pytest

from data.samplers import SampleKey
from downstream.detection.data.samplers import AspectBatches

RATIOS = np.where(np.random.default_rng(0).random(103) < 0.3, 0.7, 1.4)


def make(rank: int = 0, processes: int = 1, batch: int = 8, micro: int = 1, seed: int = 0) -> AspectBatches:
    return AspectBatches(RATIOS, batch_size=batch, micro_batches=micro, rank=rank, num_processes=processes, seed=seed)


def positions(batches: list[list[SampleKey]]) -> list[list[int]]:
    return [[key.position for key in batch] for batch in batches]


def test_steps_have_one_shape_except_the_last() -> None:
    batches = positions(list(make()))
    assert len(batches) == len(make()) == 103 // 8
    flat = [p for batch in batches for p in batch]
    assert len(set(flat)) == len(flat)
    kinds = [len({RATIOS[p] > 1 for p in batch}) for batch in batches]
    num_wide = int((RATIOS > 1).sum())
    assert kinds.count(1) >= num_wide // 8 + (103 - num_wide) // 8 - 1
    assert all(kind == 1 for kind in kinds[:-1])


def test_steps_do_not_depend_on_processes_or_accumulation() -> None:
    whole = [set(batch) for batch in positions(list(make()))]
    two = [positions(list(make(rank, 2, 4))) for rank in range(2)]
    assert [set(a) | set(b) for a, b in zip(*two, strict=True)] == whole
    assert not any(set(a) & set(b) for a, b in zip(*two, strict=True))
    micro = positions(list(make(batch=2, micro=4)))
    assert [set(chain(*micro[i : i + 4])) for i in range(0, len(micro), 4)] == whole
    both = [positions(list(make(rank, 2, 2, 2))) for rank in range(2)]
    steps = [set(chain(*(part[i] + part[i + 1] for part in both))) for i in range(0, len(both[0]), 2)]
    assert steps == whole


def test_epochs_and_seeds_differ_and_repeat() -> None:
    batches = make()
    first = list(batches)
    assert list(batches) == first
    assert positions(list(make(seed=1))) != positions(first)
    batches.set_epoch(1)
    second = list(batches)
    assert positions(second) != positions(first)
    assert {key.epoch for batch in second for key in batch} == {1}
    assert len(second) == len(first)


def test_an_epoch_can_start_at_any_batch() -> None:
    batches = make(1, 2, 2, 2)
    batches.set_epoch(3)
    whole = list(batches)
    batches.set_epoch(3, 5)
    assert list(batches) == whole[5:]
    assert len(batches) == len(whole) - 5
    batches.set_epoch(3, len(whole))
    assert list(batches) == []
    with pytest.raises(ValueError, match="an epoch has 24 micro-batches"):
        batches.set_epoch(3, len(whole) + 1)


def test_every_image_is_drawn_in_some_epoch() -> None:
    """Also those of the rarer shape, which alone would never fill a batch."""
    ratios = [2.0] * 20 + [0.5] * 3
    batches = AspectBatches(ratios, batch_size=8, micro_batches=1, rank=0, num_processes=1, seed=0)
    seen = set()
    for epoch in range(30):
        batches.set_epoch(epoch)
        seen |= {key.position for batch in batches for key in batch}
    assert seen == set(range(23))

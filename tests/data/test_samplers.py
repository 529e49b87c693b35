import numpy as np
import pytest

from data.samplers import EvalSampler, TrainSampler


def test_train_shares_are_disjoint_equal_and_repeatable() -> None:
    samplers = [TrainSampler(103, rank=rank, num_processes=4, seed=1) for rank in range(4)]
    shares = [[key.position for key in sampler] for sampler in samplers]
    assert [len(share) for share in shares] == [25] * 4
    assert len(set().union(*shares)) == 100
    assert [key.position for key in samplers[0]] == shares[0]
    samplers[0].set_epoch(1)
    other = list(samplers[0])
    assert [key.position for key in other] != shares[0]
    assert {key.epoch for key in other} == {1}


def test_an_epoch_resumes_in_its_middle() -> None:
    sampler = TrainSampler(23, rank=1, num_processes=2, seed=0)
    sampler.set_epoch(3)
    whole = list(sampler)
    assert len(whole) == len(sampler) == 11
    for start in (0, 4, 11):
        sampler.set_epoch(3, start)
        assert list(sampler) == whole[start:]
        assert len(sampler) == 11 - start
    sampler.set_epoch(4)
    assert len(list(sampler)) == 11
    for start in (-1, 12):
        with pytest.raises(ValueError, match="an epoch has 11 images"):
            sampler.set_epoch(4, start)


def test_the_images_of_a_step_do_not_depend_on_the_number_of_processes() -> None:
    one = [key.position for key in TrainSampler(64, rank=0, num_processes=1, seed=0)]
    two = [[key.position for key in TrainSampler(64, rank=rank, num_processes=2, seed=0)] for rank in (0, 1)]
    for step in range(8):
        assert set(one[8 * step : 8 * step + 8]) == {p for share in two for p in share[4 * step : 4 * step + 4]}


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_evaluation_shares_hold_each_image_once(num_processes: int) -> None:
    shares = [list(EvalSampler(101, rank=rank, num_processes=num_processes)) for rank in range(num_processes)]
    assert sorted(key.position for share in shares for key in share) == list(range(101))
    assert [len(EvalSampler(101, rank=r, num_processes=num_processes)) for r in range(num_processes)] == [
        len(share) for share in shares
    ]


@pytest.mark.parametrize("num_images", [64, 6400, 12_811, 100])
def test_shards_of_64_ranks_are_disjoint_complete_and_balanced(num_images: int) -> None:
    """Each process keeps to its shard, of which an epoch leaves out one image at most."""
    samplers = [TrainSampler(num_images, rank=r, num_processes=64, seed=3, keeps_shard=True) for r in range(64)]
    shards = [set(sampler.order(0).tolist()) for sampler in samplers]
    sizes = [len(shard) for shard in shards]
    assert sum(sizes) == len(set().union(*shards)) == num_images
    assert max(sizes) - min(sizes) <= 1
    seen: list[set[int]] = [set() for _ in samplers]
    for epoch in range(12):
        for sampler, shard, so_far in zip(samplers, shards, seen, strict=True):
            sampler.set_epoch(epoch)
            images = [key.position for key in sampler]
            assert len(images) == len(set(images)) == num_images // 64
            assert shard.issuperset(images)
            so_far.update(images)
    if min(sizes) > 1:
        assert len(set().union(*seen)) == num_images  # what one epoch leaves out, another reads


def test_shares_of_64_ranks_are_disjoint_and_equal_without_shards() -> None:
    shares = [{key.position for key in TrainSampler(12_811, rank=r, num_processes=64, seed=3)} for r in range(64)]
    assert {len(share) for share in shares} == {12_811 // 64}
    assert len(set().union(*shares)) == 12_811 // 64 * 64
    assert sum(len(EvalSampler(12_811, rank=r, num_processes=64)) for r in range(64)) == 12_811


@pytest.mark.parametrize("keeps_shard", [False, True])
def test_keys_hold_their_slot_in_the_order(keeps_shard: bool) -> None:
    sampler = TrainSampler(101, rank=2, num_processes=3, seed=0, keeps_shard=keeps_shard)
    sampler.set_epoch(5, start=4)
    order = sampler.order(5)
    assert all(order[key.slot] == key.position and key.epoch == 5 for key in sampler)
    assert not np.array_equal(order, sampler.order(6))

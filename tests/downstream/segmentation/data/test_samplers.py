import pytest

from downstream.segmentation.data.samplers import Draw, EndlessBatches


def make(**options: int) -> EndlessBatches:
    defaults = {"batch_size": 4, "batches_per_epoch": 3, "rank": 0, "num_processes": 1, "seed": 5}
    return EndlessBatches(10, **(defaults | options))


def draws_of(batches: EndlessBatches, epochs: int, *, start: int = 0) -> list[list[Draw]]:
    found = []
    for epoch in range(epochs):
        batches.set_epoch(epoch, start if epoch == 0 else 0)
        assert len(batches) == batches.batches_per_epoch - (start if epoch == 0 else 0)
        found += list(batches)
    return found


def test_order_is_one_permutation_after_another() -> None:
    draws = [draw for batch in draws_of(make(), 5) for draw in batch]
    assert len(draws) == 60
    groups = [draws[i : i + 10] for i in range(0, 60, 10)]
    for epoch, group in enumerate(groups):
        assert {draw.epoch for draw in group} == {epoch}
        assert sorted(draw.image for draw in group) == list(range(10))
    assert len({tuple(draw.image for draw in group) for group in groups}) == 6
    assert draws != [draw for batch in draws_of(make(seed=6), 5) for draw in batch]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_any_point_can_be_the_start(start: int) -> None:
    assert draws_of(make(), 3, start=start) == draws_of(make(), 3)[start:]


@pytest.mark.parametrize(("num_processes", "batch_size"), [(2, 2), (4, 1)])
def test_a_step_has_the_same_images_for_any_number_of_processes(num_processes: int, batch_size: int) -> None:
    shares = [
        draws_of(make(rank=rank, num_processes=num_processes, batch_size=batch_size), 4)
        for rank in range(num_processes)
    ]
    for step, whole in enumerate(draws_of(make(), 4)):
        assert sorted(draw for share in shares for draw in share[step]) == sorted(whole)


def test_starting_beyond_the_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="start_batch 4: an epoch has 3 for this process"):
        make().set_epoch(0, 4)

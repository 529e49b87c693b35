"""What makes set-up shorter changes nothing else."""

import gc
import threading
import time

import pytest
import torch

from utils.speed import set_up
from utils.speed.set_up import garbage_collection_paused, loading_cuda_libraries, use_libraries


@pytest.mark.parametrize("fails", [False, True])
def test_using_libraries_neither_draws_nor_raises(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    products = []

    def linear(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products.append(tokens.shape)
        if fails:
            raise torch.OutOfMemoryError
        return tokens @ weight.t()

    monkeypatch.setattr(set_up.F, "linear", linear)
    generator = torch.get_rng_state()
    use_libraries(torch.device("cpu"))
    assert products == [(8, 32, 32, 32)]
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(("kind", "loads"), [("cuda", True), ("cpu", False)])
def test_libraries_are_loaded_by_a_thread_that_ends_with_the_context(
    monkeypatch: pytest.MonkeyPatch, kind: str, loads: bool
) -> None:
    used: list[tuple[torch.device, bool]] = []
    may_end = threading.Event()

    def use(device: torch.device) -> None:
        may_end.wait(10)
        time.sleep(0.01)
        used.append((device, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(set_up, "use_libraries", use)
    with pytest.raises(KeyError), loading_cuda_libraries(torch.device(kind)):  # noqa: PT012
        may_end.set()
        raise KeyError
    assert used == [(torch.device(kind), False)] * loads


@pytest.mark.parametrize("is_on", [True, False])
def test_the_garbage_collector_is_paused_and_left_as_it_was(is_on: bool) -> None:
    was_on = gc.isenabled()
    try:
        (gc.enable if is_on else gc.disable)()
        with pytest.raises(KeyError), garbage_collection_paused():  # noqa: PT012
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == is_on
    finally:
        (gc.enable if was_on else gc.disable)()

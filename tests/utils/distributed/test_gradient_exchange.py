"""The gradient exchange: several processes train as one; slices; parameters without gradient."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import run_python
from tests.utils.distributed.exchange_worker import CASES, Network, train
from utils.distributed import gradient_exchange
from utils.distributed.gradient_exchange import Slice, should_overlap, split_parameters
from utils.distributed.process import Process


@pytest.fixture(scope="module", params=[2, 3])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("exchange") / "out.pt"
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    done = run_python(*command, "tests/utils/distributed/exchange_worker.py", out, forked=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_processes_train_as_one(launched: dict[str, Any], case: str) -> None:
    alone = train(Process(0, 1, torch.device("cpu")), case)
    first, *others = (results[case] for results in launched["processes"])
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6, msg=name)
        assert all(torch.equal(first[name], other[name]) for other in others), name
    moved = (first["model.head.weight"] - first["ema.head.weight"]).abs().max()
    assert moved > 1e-3  # it trains


@pytest.mark.slow
def test_parameters_without_gradient_are_left_alone(launched: dict[str, Any]) -> None:
    results = launched["processes"][0]["unused"]
    torch.manual_seed(0)
    before = Network().double()
    assert torch.equal(results["model.never.weight"], before.never.weight)  # no weight decay, either
    assert not torch.equal(results["model.seldom.weight"], before.seldom.weight)
    assert "1.weight" in launched["refused"]
    assert "TRAIN.FIND_UNUSED_PARAMS" in launched["refused"]


def test_slices_follow_the_backward_pass_and_the_last_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_exchange, "LAST_SLICE_BYTES", 100)
    monkeypatch.setattr(gradient_exchange, "SLICE_BYTES", 400)
    sizes = [10, 15, 60, 40, 90, 20, 500]  # of float32
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    slices = split_parameters(parameters)
    assert [[p.numel() for p in s] for s in slices] == [[500], [20], [90], [60, 40], [10, 15]]


def test_one_slice_for_each_dtype_after_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_exchange, "LAST_SLICE_BYTES", 100)
    dtypes = [torch.float32, torch.float32, torch.float64]
    parameters = [nn.Parameter(torch.zeros(100, dtype=dtype)) for dtype in dtypes]
    assert [len(s) for s in split_parameters(parameters, overlaps=False)] == [1, 2]


def test_fast_gpus_exchange_after_the_backward_pass() -> None:
    assert should_overlap(None)  # CPUs
    assert should_overlap(25e9)  # PCIe
    assert not should_overlap(240e9)  # NVLink
    torch.use_deterministic_algorithms(True)
    try:
        assert should_overlap(240e9)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_sum_for_which_a_process_was_late_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one that connects the processes and one that lets them begin together, 32 MiB in 0.25 ms."""
    milliseconds, sums = iter((3.0, 3.25, 3.5, 53.5, 53.75, 54.0)), []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = next(milliseconds)

        def elapsed_time(self, end: "Event") -> float:
            return end.time - self.time

        def synchronize(self) -> None:
            assert self.time == 54

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))  # noqa: ARG005
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(gradient_exchange.dist, "all_reduce", lambda tensor: sums.append(tensor.numel()))
    speed = gradient_exchange.all_reduce_speed(torch.device("cuda"))
    assert speed == pytest.approx(2**25 / 0.25e-3)
    assert sums == [2**25] * 7


def test_views_have_the_memory_format_of_their_parameters() -> None:
    conv = nn.Conv2d(6, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    s = Slice([conv.bias, conv.weight])
    assert [view.stride() for view in s.views] == [conv.bias.stride(), conv.weight.stride()]
    s.views[1].fill_(1)
    assert s.flat.sum() == conv.weight.numel()
    assert s.views[0].sum() == 0
    assert all(view.data_ptr() % 16 == s.flat.data_ptr() % 16 for view in s.views)

"""CUDA graphs for frequent shapes, simulated on the CPU, real on a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.speed import shape_graphs
from utils.speed.compile import RECORDING
from utils.speed.shape_graphs import CALLS_PER_GRAPH, REPLAYS_PER_GRAPH, FrequentShapes, ShapeGraphs
from utils.speed.streams import on_side_stream

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
ENOUGH = 100 * CALLS_PER_GRAPH


def simulate(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Let a capture on the CPU compute nothing, and a replay call the function."""
    if device == "cpu":
        monkeypatch.setattr(shape_graphs, "Capture", lambda function, **_: function)


def shapes_recorded(shapes: str, **options: int) -> str:
    """Return the shapes, letters, in the order in which they are recorded."""
    frequent: FrequentShapes[str] = FrequentShapes(**options)
    made: list[str] = []
    for shape in shapes:
        assert frequent.get(shape, lambda shape=shape: made.append(shape) or shape) in (shape, None)  # type: ignore
    return "".join(made)


@pytest.mark.parametrize(
    ("shapes", "limit", "recorded"),
    [
        ("abcabc", 3, "abc"),  # the second time
        ("abcdef", 3, ""),
        ("aabbaaccbbaa", 2, "abcb" + "a"),  # the least recently used is dropped: b for c, a for b, c for a
        ("aaaaaaaa", 1, "a"),
    ],
)
def test_frequent_shapes_are_recorded(shapes: str, limit: int, recorded: str) -> None:
    assert shapes_recorded(shapes, num_calls=ENOUGH, limit=limit) == recorded


def test_recordings_have_a_budget() -> None:
    """Of the run's length, and of replays: else more shapes than there is room for would be recorded without end."""
    assert shapes_recorded("aa", num_calls=CALLS_PER_GRAPH - 1) == ""
    assert shapes_recorded("aabbcc", num_calls=2 * CALLS_PER_GRAPH) == "ab"
    assert shapes_recorded("aa" + "a" * REPLAYS_PER_GRAPH + "bb", num_calls=CALLS_PER_GRAPH) == "ab"
    many = "".join(map(chr, range(1000, 1100))) * 10
    assert len(shapes_recorded(many, num_calls=ENOUGH // 10, limit=1)) <= 12


class Net(nn.Module):
    """A network with batch norm, dropout, an output that is a view with gaps, and a parameter without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = nn.functional.dropout(self.norm(self.conv(images)), 0.5)
        return x, x[:, :, ::2, ::2]


def train(device: str, wrap: Callable[[Net], Any]) -> list[Tensor]:
    """Take steps with images of three shapes, two micro-batches each; return losses, weights and statistics."""
    torch.manual_seed(0)
    net = Net().to(device)
    part, optimizer, losses = wrap(net), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    torch.manual_seed(1)
    for step in range(12):
        with on_side_stream(torch.device(device), RECORDING):
            optimizer.zero_grad(set_to_none=True)
            for side in (8 + step % 3, 8):
                images = torch.randn(2, 3, side, 9, device=device).contiguous(memory_format=torch.channels_last)
                full, coarse = part(images)
                loss = full.square().mean() + coarse.contiguous().sin().sum()
                losses.append(loss.detach())
                loss.backward()
            assert net.unused.grad is None
            optimizer.step()
    return [*losses, *net.state_dict().values()]


@pytest.mark.parametrize("device", DEVICES)
def test_replays_compute_the_same_bits(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Through gradient accumulation, changing shapes, dropout and batch norm's statistics."""
    simulate(monkeypatch, device)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    graphs: list[ShapeGraphs] = []

    def wrap(net: Net, num_calls: int) -> ShapeGraphs:
        graphs.append(ShapeGraphs(net, list(net.parameters()), num_calls=num_calls, limit=2))
        return graphs[-1]

    eager, replayed = (train(device, partial(wrap, num_calls=num_calls)) for num_calls in (0, ENOUGH))
    assert graphs[0].frequent.num_recorded == 0
    assert graphs[1].frequent.num_recorded > 3  # one is dropped, and recorded again
    assert all(one.equal(other) for one, other in zip(eager, replayed, strict=True))
    torch.testing.assert_close(eager[:2], train(device, lambda net: net)[:2])


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(shape_graphs.logger, "warning", lambda line, *args: said.append(line % args))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(shape_graphs, "Capture", fail)
    found, eager = (
        train("cpu", lambda net, n=num_calls: ShapeGraphs(net, list(net.parameters()), num_calls=n))  # type: ignore
        for num_calls in (ENOUGH, 0)
    )
    assert all(one.equal(other) for one, other in zip(eager, found, strict=True))
    assert said == ["The step has no CUDA graphs: operation not permitted when stream is capturing"]


def test_too_little_memory_stops_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "cpu")
    said: list[str] = []
    monkeypatch.setattr(shape_graphs.logger, "warning", lambda line, *args: said.append(line % args))
    monkeypatch.setattr(shape_graphs, "lack_of_memory", lambda _: "little memory" if graphs.frequent.recordings else "")
    net = Net()
    graphs = ShapeGraphs(net, list(net.parameters()), num_calls=ENOUGH)
    for side in (8, 8, 9, 9, 9, 8):
        graphs(torch.randn(2, 3, side, 8))[0].sum().backward()
    assert said == ["No more CUDA graphs are recorded: little memory"]
    assert len(graphs.frequent.recordings) == 1


def test_running_out_of_memory_drops_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "cpu")
    said: list[str] = []
    monkeypatch.setattr(shape_graphs.logger, "warning", lambda line, *args: said.append(line % args))
    net, fails = Net(), [False]

    def part(images: Tensor) -> tuple[Tensor, ...]:
        if fails.pop():
            fails.append(False)
            raise torch.OutOfMemoryError
        fails.append(False)
        return net(images)

    graphs = ShapeGraphs(part, list(net.parameters()), num_calls=ENOUGH)
    for side in (8, 8, 9):
        fails[0] = side == 9
        graphs(torch.randn(2, 3, side, 8))[0].sum().backward()
    assert len(said) == 1
    assert not graphs.frequent.recordings
    assert graphs.arena is None
    fails[0] = True
    with pytest.raises(torch.OutOfMemoryError):
        graphs(torch.randn(2, 3, 10, 8))


def test_outputs_that_were_overwritten_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "cpu")
    net = Net()
    graphs, images = ShapeGraphs(net, list(net.parameters()), num_calls=ENOUGH), torch.randn(2, 3, 8, 8)
    graphs(images)
    earlier = graphs(images)[0].sum()
    graphs(images)
    with pytest.raises(AssertionError, match="overwritten"):
        earlier.backward()

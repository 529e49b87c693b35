"""CUDA graphs of functions without gradients, simulated on the CPU, real on a GPU."""

import pytest
import torch
from torch import Tensor, nn

from tests.utils.speed.test_shape_graphs import DEVICES
from utils.speed import inference_graphs, shape_graphs
from utils.speed.inference_graphs import FIRST_RECORDINGS, InferenceGraphs


def simulate_inference(monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """Let a capture on the CPU compute nothing, and a replay call the function; on a GPU, let convolutions be exact.

    TF32 is off there since cuDNN may choose it for one number of images or regions and not for another.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if device == "cpu":
        monkeypatch.setattr(inference_graphs, "Capture", lambda function, **_: function)


def convolve(layer: nn.Conv2d, images: Tensor, factor: Tensor) -> list[Tensor]:
    x = layer(images)
    return [x * factor, x[:, :, ::2].amax(dim=(2, 3))]


@pytest.mark.parametrize("device", DEVICES)
def test_results_for_frequent_shapes_under_changing_weights(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Also with autocast, whose casts of weights are part of the graph."""
    simulate_inference(monkeypatch, device)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    layer = nn.Conv2d(3, 4, 3).to(device)
    graphs = InferenceGraphs(lambda *inputs: convolve(layer, *inputs))
    for step in range(12):
        images = torch.randn(1, 3, 8 + step % 3, 9, device=device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            layer.weight.normal_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=step >= 6), torch.inference_mode(step % 2 == 0):
            found = graphs(images, torch.tensor(2.0, device=device))
            expected = convolve(layer, images, torch.tensor(2.0, device=device))
        assert all(one.equal(other) and one.dtype == other.dtype for one, other in zip(found, expected, strict=True))
        assert not found[0].requires_grad
    assert graphs.frequent.num_recorded == 6  # three shapes, with and without autocast
    graphs.clear()
    assert not graphs.frequent.recordings
    assert graphs.arena is None


def test_the_first_shapes_are_recorded_and_others_once_these_were_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_inference(monkeypatch)
    graphs = InferenceGraphs(lambda x: (x + 1,))
    for side in [*range(20)] * 2:
        graphs(torch.zeros(side + 1))
    assert graphs.frequent.num_recorded == FIRST_RECORDINGS
    for _ in range(10):
        graphs(torch.zeros(1))
    assert graphs(torch.zeros(20))[0].equal(torch.ones(20))
    assert graphs.frequent.num_recorded == FIRST_RECORDINGS + 1


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(shape_graphs.logger, "warning", lambda line, *args: said.append(line % args))

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inference_graphs, "Capture", fail)
    graphs = InferenceGraphs(lambda x: (x + 1,))
    assert all(graphs(torch.zeros(2))[0].equal(torch.ones(2)) for _ in range(4))
    assert said == ["Evaluation has no CUDA graphs: CUDA out of memory"]
    assert graphs.frequent.num_recorded == 0


def test_a_full_gpu_gets_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, gigabyte = InferenceGraphs(lambda x: (x,)), 2**30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6 * gigabyte)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * gigabyte)
    for free, reason in ((4, "7.0 GiB of memory are free, and they need 8.0 GiB"), (5, "")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * gigabyte, 32 * gigabyte))
        assert graphs.lack_of_memory(torch.device("cuda")) == reason

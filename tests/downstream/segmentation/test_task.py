"""The training step of segmentation as one CUDA graph, simulated on the CPU, real on a GPU."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from downstream.segmentation.config import load_config
from downstream.segmentation.task import Segmentation
from tests.utils.speed.test_compile import SimulatedCapture
from tests.utils.speed.test_inference_graphs import simulate_inference
from tests.utils.speed.test_shape_graphs import DEVICES
from utils.distributed.process import Process
from utils.speed.inference_graphs import InferenceGraphs
from utils.training import build, graphed_step
from utils.training.graphed_step import GraphedTrainStep
from utils.training.train_step import TrainStep

BACKBONE = {"MODEL.MLLA.EMBED_DIM": 16, "MODEL.MLLA.DEPTHS": [1, 1, 1, 1], "MODEL.MLLA.NUM_HEADS": [1, 1, 2, 4]}
MODEL = {**BACKBONE, "MODEL.HEAD.CHANNELS": 8, "MODEL.HEAD.AUXILIARY_CHANNELS": 4}
DATA = {"DATA.BATCH_SIZE": 2, "AUG.CROP_SIZE": 64, "MODEL.NUM_CLASSES": 5}


Tensors = list[Tensor]


def train(monkeypatch: pytest.MonkeyPatch, device: str, mode: str) -> tuple[TrainStep, Tensors, Tensor, Tensors]:
    """Take eight steps; return the step, losses, how far the weights moved, and statistics.

    SGD moves weights as far as gradients are large: AdamW would move them by the same step where these are rounding.
    """
    task, process = Segmentation(), Process(0, 1, torch.device(device))
    config = load_config(
        "mlla_t_upernet", flags={**MODEL, **DATA, "TRAIN.COMPILE": mode, "TRAIN.OPTIMIZER.NAME": "sgd"}
    )
    torch.manual_seed(0)
    model = task.build_model(config, process, None).to(device).train()
    initial = nn.utils.parameters_to_vector(model.parameters()).detach()
    derived = task.derive(config, num_processes=1, num_train_images=100)
    optimizer = build.build_optimizer(config, task.parameter_groups(config, model))
    parts: Any = (task, config, model, process, optimizer, None, build.build_precision(config, process.device), derived)
    step = build.build_train_step(*parts)
    if device == "cpu":
        monkeypatch.setattr(graphed_step, "Capture", partial(SimulatedCapture, optimizer))
    losses = []
    for i in range(8):
        torch.manual_seed(i)
        losses.append(step([task.synthetic_batch(config, model, process.device)], step=i, learning_rate=0.01).loss)
        losses[-1] = losses[-1].clone()
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - initial
    return step, losses, moved, list(model.buffers())


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_is_one_graph(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    _, losses, moved, statistics = train(monkeypatch, device, "off")
    noise = (train(monkeypatch, device, "off")[2] - moved).norm() / moved.norm()  # a GPU adds in any order
    monkeypatch.setattr(build, "compile_regions", lambda *_, **__: None)
    if device == "cpu":
        monkeypatch.setattr(build, "graph_unsupported_reason", lambda _: "")
    step, *graphed = train(monkeypatch, device, "reduce-overhead")
    assert isinstance(step, GraphedTrainStep)
    assert step.capture is not None
    torch.testing.assert_close(losses, graphed[0], rtol=1e-3, atol=1e-3)
    difference = (graphed[1] - moved).norm() / moved.norm()
    assert difference <= (3 * noise).clamp(0.01, 0.1)  # a step that is left out makes 0.18
    torch.testing.assert_close(statistics, graphed[2], rtol=5e-2, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_with_graphs_equal_those_without(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Also those of an earlier call, which the next one must not overwrite."""
    simulate_inference(monkeypatch, device)
    config = load_config("mlla_t_upernet", flags={**MODEL, **DATA})
    model = Segmentation().build_model(config, Process(0, 1, torch.device(device)), None).to(device).eval()
    images = [torch.randn(1, 3, 64, width).to(device) for width in (64, 96, 64, 64)]
    with torch.no_grad():
        expected = [model(x) for x in images]
        graphs: list[InferenceGraphs] = []
        model.record_inference(lambda function: graphs.append(InferenceGraphs(function)) or graphs[-1])  # type: ignore
        found = [model(x) for x in images]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert graphs[0].frequent.num_recorded == 1

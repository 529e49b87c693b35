"""The compiled model of evaluations takes the weights of one model after the other."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from config import load_config
from downstream.segmentation.task import Segmentation
from main import Classification
from models import MLLA
from tests.helpers import MICRO
from tests.utils.speed.test_inference_graphs import simulate_inference
from utils.training import inference
from utils.training.build import build_inference_model
from utils.training.inference import InferenceModel

CPU = torch.device("cpu")


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = MLLA(num_classes=5, **MICRO)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.train()


def test_one_compilation_serves_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def note(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        compiled.append(model.eval())
        return model

    monkeypatch.setattr(inference, "compile_for_inference", note)
    config = load_config("cfgs/digits.yaml", flags={"TEST.COMPILE": "default"})
    as_compiled = build_inference_model(Classification(), config, CPU)
    images = torch.randn(3, 3, 64, 64)
    for seed in (0, 1, 0):
        model = make_model(seed)
        result = as_compiled(model)(images)
        assert model.training  # the next step needs no change of mode
        torch.testing.assert_close(result, model.eval()(images), atol=1e-5, rtol=1e-5)
    assert len(compiled) == 1


def test_models_of_one_pass_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "compile_for_inference", lambda model, *_, **__: model.eval())
    config = load_config("cfgs/digits.yaml", flags={"TEST.COMPILE": "default"})
    as_compiled = build_inference_model(Classification(), config, CPU)
    models = {"model": make_model(0), "EMA": make_model(1)}
    for _ in range(2):  # the second evaluation has other weights
        together = as_compiled.together(models)
        assert (list(together), len(together)) == (["model", "EMA"], 2)
        for seed in range(2):
            images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
            for name, model in models.items():
                expected = copy.deepcopy(model).eval()(images)
                torch.testing.assert_close(together[name](images), expected, atol=1e-5, rtol=1e-5)
        models = {"model": make_model(2), "EMA": make_model(3)}


def test_off_leaves_the_model_as_it_is() -> None:
    config = load_config("cfgs/digits.yaml", flags={"TEST.COMPILE": "off"})
    model = make_model(0)
    assert build_inference_model(Classification(), config, CPU)(model) is model


def test_auto_is_off_on_a_cpu() -> None:
    config = load_config("cfgs/digits.yaml")
    assert config.TEST.COMPILE == "auto"
    assert build_inference_model(Classification(), config, CPU).mode == "off"


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def double(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * self.scale,)

    def record_inference(self, make: Any) -> None:
        self.double = make(self.double)  # type: ignore[method-assign]


def test_graphs_by_shape_serve_all_weights_until_their_context_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_inference(monkeypatch)
    monkeypatch.setattr(inference, "uses_graphs", lambda *_: True)
    task: Any = Segmentation()
    monkeypatch.setattr(task, "compiled_module", "")
    as_compiled, model = InferenceModel(task, "graphs", CPU, torch.float32), Doubling()
    for value in (2.0, 3.0):
        nn.init.constant_(model.scale, value)
        with as_compiled:
            prepared: Any = as_compiled(model)
            assert [prepared.double(torch.ones(4))[0].tolist() for _ in range(3)] == [[value] * 4] * 3
            (graphs,) = as_compiled.graphs
            assert graphs.frequent.num_recorded == 1
        assert not graphs.frequent.recordings

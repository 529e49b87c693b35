"""Files of other programs: which set is the average, and the model's own names."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from utils.checkpoint.weight_sets import Weights, find_weight_sets

NAMES = ("layers.0.blocks.0.norm1.weight", "layers.0.blocks.1.norm1.weight", "patch_embed.conv1.weight", "head.bias")
MODEL = {name: torch.full((2,), float(i)) for i, name in enumerate(NAMES)}
NECK = {"neck.a": torch.ones(1)}
EMA = {name: value + 0.5 for name, value in MODEL.items()}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def averaged(weights: Weights, counter: str = "n_averaged") -> Weights:
    """Return the state_dict of an averaged model: torch's, or mmengine's whose counter is called steps."""
    return {counter: torch.tensor(7), **prefixed("module.", weights)}


def compiled_blocks(weights: Weights) -> Weights:
    return {re.sub(r"(blocks\.\d+)", r"\1._orig_mod", name): value for name, value in weights.items()}


def numbers(weights: Weights | None) -> dict[str, list[float]] | None:
    return None if weights is None else {name: value.tolist() for name, value in weights.items()}


@pytest.mark.parametrize(
    ("content", "model", "ema"),
    [
        (MODEL, MODEL, None),
        ({"model": MODEL, "state_dict_ema": EMA}, MODEL, EMA),
        ({"model": MODEL, "state_dict_ema": None}, MODEL, None),
        ({"model_state_dict": MODEL, "ema": EMA}, MODEL, EMA),
        # torchvision's reference scripts, torch's AveragedModel
        ({"model": MODEL, "model_ema": averaged(EMA)}, MODEL, EMA),
        ({"model": prefixed("module.", MODEL), "model_ema": averaged(prefixed("module.", EMA))}, MODEL, EMA),
        (averaged(EMA), None, EMA),
        ({"model": averaged(EMA)}, None, EMA),
        ({"state_dict": averaged(prefixed("_orig_mod.", EMA))}, None, EMA),
        # mmengine, whose EMAHook exchanges the two
        ({"state_dict": EMA, "ema_state_dict": averaged(MODEL, "steps"), "meta": {}}, MODEL, EMA),
        ({"state_dict": prefixed("module.", EMA), "ema_state_dict": averaged(MODEL, "steps")}, MODEL, EMA),
        ({"state_dict": MODEL, "ema_state_dict": EMA}, MODEL, EMA),  # others do not
        # Lightning
        ({"state_dict": prefixed("model.", MODEL), "epoch": 1}, MODEL, None),
        ({"state_dict": prefixed("net._orig_mod.", MODEL) | {"loss.weight": torch.ones(3)}}, MODEL, None),
        ({"state_dict": prefixed("model.", MODEL) | prefixed("model_ema.module.", EMA)}, MODEL, EMA),
        ({"state_dict": prefixed("model.", MODEL) | prefixed("ema_model.", averaged(EMA))}, MODEL, EMA),
        (
            {
                "state_dict": prefixed("model.", EMA),
                "current_model_state": prefixed("model.", MODEL),
                "averaging_state": {"n_averaged": torch.tensor(7)},
            },
            MODEL,
            EMA,
        ),
        # wrappers in the middle of names, and dictionaries within each other
        ({"model": compiled_blocks(MODEL), "state_dict_ema": compiled_blocks(EMA)}, MODEL, EMA),
        (prefixed("module.", compiled_blocks(MODEL)), MODEL, None),
        (prefixed("backbone.module.", MODEL) | NECK, prefixed("backbone.", MODEL) | NECK, None),
        ({"model": {"state_dict": MODEL, "ema": EMA}, "epoch": 3}, MODEL, EMA),
        ({"state_dict": {"model": MODEL, "model_ema": averaged(EMA)}}, MODEL, EMA),
        # not wrappers
        (MODEL | {"module.a": torch.ones(1)}, MODEL | {"module.a": torch.ones(1)}, None),
        (MODEL | {"n_averaged": torch.tensor(7)}, MODEL | {"n_averaged": torch.tensor(7)}, None),
        ({"model": 3, "state_dict": "text", "epoch": 1}, None, None),
        ({}, None, None),
    ],
)
def test_sets_in_files(content: dict[str, Any], model: Weights | None, ema: Weights | None) -> None:
    found = find_weight_sets(content)
    for weights, expected in ((found.model, model), (found.ema, ema)):
        assert numbers(weights) == numbers(expected)
        assert list(weights or {}) == list(expected or {})  # order is kept


def test_torchs_own_averaged_model() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = AveragedModel(model, use_buffers=True)
    found = find_weight_sets({"model": model.state_dict(), "model_ema": average.state_dict()})
    own: dict[str, Tensor] = model.state_dict()
    assert found.ema is not None
    assert numbers(found.ema) == numbers(own)
    model.load_state_dict(found.ema)


def test_dictionaries_that_contain_themselves() -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    assert find_weight_sets(content) == (None, None)

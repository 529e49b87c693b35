"""Which of the model's and the EMA's weights the commands use."""

import math
from typing import Any

import pytest
import torch

from utils.checkpoint.best_weights import choose_weights
from utils.checkpoint.weights_file import CheckpointError

MODEL, EMA = {"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0)}
BOTH = {"model": MODEL, "state_dict_ema": EMA}


@pytest.mark.parametrize(
    ("scores", "expected", "description"),
    [
        ({"scores": {"model": 98.3, "EMA": 20.0}}, MODEL, "model weights (score of the model 98.30, of the EMA 20.00)"),
        ({"scores": {"model": 90.0, "EMA": 91.5}}, EMA, "EMA weights (score of the model 90.00, of the EMA 91.50)"),
        ({"scores": {"model": 90.0, "EMA": 90.0}}, EMA, "EMA weights (score of the model 90.00, of the EMA 90.00)"),
        # The file's own scores count, not the best ones until then.
        (
            {"scores": {"model": 70.0, "EMA": 71.0}, "max_accuracy": 99.0, "max_accuracy_e": 71.0},
            EMA,
            "EMA weights (score of the model 70.00, of the EMA 71.00)",
        ),
        (
            {"max_accuracy": 97.0, "max_accuracy_e": 20.0},
            MODEL,
            "model weights (score of the model 97.00, of the EMA 20.00)",
        ),
        ({"scores": {"model": math.nan, "EMA": 1.0}}, EMA, "EMA weights (score of the model nan, of the EMA 1.00)"),
        ({"scores": {"model": 1.0, "EMA": math.nan}}, MODEL, "model weights (score of the model 1.00, of the EMA nan)"),
        ({}, EMA, "EMA weights"),
        ({"scores": None}, EMA, "EMA weights"),
    ],
)
def test_the_better_weights_by_the_files_own_scores(scores: dict[str, Any], expected: Any, description: str) -> None:
    content = {**BOTH, **scores}
    assert choose_weights(content, "w.pth") == (expected, description)
    assert choose_weights(content, "w.pth", ema=True)[0] == EMA
    assert choose_weights(content, "w.pth", ema=False)[0] == MODEL


def test_a_file_with_one_set_of_weights() -> None:
    assert choose_weights({"model": MODEL}, "w.pth") == (MODEL, "")
    assert choose_weights({"state_dict_ema": EMA}, "w.pth") == (EMA, "")
    assert choose_weights({"model": MODEL}, "w.pth", ema=False)[0] == MODEL
    with pytest.raises(CheckpointError, match=r"w.pth: has no EMA weights; leave out --ema"):
        choose_weights({"model": MODEL}, "w.pth", ema=True)
    with pytest.raises(CheckpointError, match=r"w.pth: has no model weights; leave out --no-ema"):
        choose_weights({"state_dict_ema": EMA}, "w.pth", ema=False)
    assert choose_weights({"epoch": 1}, "w.pth")[0] is None

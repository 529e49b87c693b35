"""What the configuration says about the parts of a run."""

from typing import Any

import pytest
import torch

from config import load_config
from downstream.detection.task import Detection
from downstream.segmentation.task import Segmentation
from main import Classification
from utils.training.build import has_one_training_shape, model_uses

EVAL, THROUGHPUT = {"EVAL_MODE": True}, {"THROUGHPUT_MODE": True}
TIMES_TRAINING = {**THROUGHPUT, "BENCHMARK.TRAIN": True}
OFF, COMPILED, MESA = {"TEST.COMPILE": "off"}, {"TEST.COMPILE": "default"}, {"AUG.MESA": 1.0}


@pytest.mark.parametrize(
    ("flags", "on_gpu", "on_cpu"),
    [
        ({}, "training prepared", "training inference"),
        (OFF, "training inference", "training inference"),
        (MESA, "training inference prepared", "training inference"),
        ({**MESA, "EMA.ENABLED": False}, "training prepared", "training inference"),
        (EVAL, "prepared", "inference"),
        ({**EVAL, **MESA}, "prepared", "inference"),
        ({**EVAL, **OFF}, "inference", "inference"),
        ({**EVAL, **COMPILED}, "prepared", "prepared"),
        ({**EVAL, "DATA.BATCH_SIZE": 2}, "prepared one_image", "inference"),
        ({"DATA.BATCH_SIZE": 2}, "training prepared", "training inference"),
        (THROUGHPUT, "prepared one_image", "inference"),
        (TIMES_TRAINING, "training", "training"),
        ({**TIMES_TRAINING, **MESA}, "training inference", "training inference"),
        ({**THROUGHPUT, "BENCHMARK.LOADING": "8"}, "training prepared", "training inference"),
    ],
)
def test_uses_of_the_model(flags: dict[str, Any], on_gpu: str, on_cpu: str) -> None:
    config = load_config("cfgs/digits.yaml", flags={"AUG.MESA": 0.0, **flags})
    for device, uses in (("cuda", on_gpu), ("cpu", on_cpu)):
        assert model_uses(config, torch.device(device)) == set(uses.split())


def test_modules_compiled_for_training_see_one_shape_unless_evaluation_uses_them() -> None:
    config = load_config("cfgs/digits.yaml", flags=COMPILED)
    gpu = torch.device("cuda")
    assert has_one_training_shape(Classification(), config, gpu)
    assert not has_one_training_shape(Classification(), load_config("cfgs/digits.yaml", flags=OFF), gpu)
    automatic = load_config("cfgs/digits.yaml", flags={"TEST.COMPILE": "auto"})
    assert has_one_training_shape(Classification(), automatic, gpu)
    assert has_one_training_shape(Segmentation(), automatic, gpu)
    assert not has_one_training_shape(Detection(), automatic, gpu)

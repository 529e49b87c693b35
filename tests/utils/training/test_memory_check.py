"""Estimates of a step's memory, for all tasks."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from config import load_config
from downstream.detection.config import load_config as load_detection
from downstream.detection.task import Detection
from downstream.segmentation.config import load_config as load_segmentation
from downstream.segmentation.task import Segmentation
from main import Classification
from utils.distributed.process import Process
from utils.training import memory_check
from utils.training.amp import make_precision
from utils.training.derived import Derived
from utils.training.memory_check import memory_warning, step_bytes
from utils.training.task import Run, Task

PROCESS = Process(0, 1, torch.device("cpu"))
TASKS = {
    "classification": (Classification(), load_config, "cfgs/digits.yaml"),
    "detection": (Detection(), load_detection, "downstream/detection/cfgs/shapes.yaml"),
    "segmentation": (Segmentation(), load_segmentation, "downstream/segmentation/cfgs/shapes.yaml"),
}


def parts(name: str, batch_size: int, *opts: str) -> tuple[Task, Run, Derived]:
    task, load, path = TASKS[name]
    config = load(path, ["DATA.BATCH_SIZE", str(batch_size), *opts])  # type: ignore[operator]
    model = task.build_model(config, PROCESS, 10)
    run = Run(config, PROCESS, Path(), None, model, make_precision(PROCESS.device, amp=config.AMP, dtype="auto"))
    return task, run, task.derive(config, num_processes=1, num_train_images=1000)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_takes_what_its_images_and_its_weights_take(name: str) -> None:
    """Nothing is computed with the model, and no random number drawn."""
    task, run, derived = parts(name, 4)
    state = torch.get_rng_state()
    four = step_bytes(task, run, derived)
    assert torch.get_rng_state().equal(state)
    assert all(parameter.device.type == "cpu" for parameter in run.model.parameters())
    weights = 3 * sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    eight = step_bytes(*parts(name, 8))
    assert four is not None
    assert eight is not None
    assert eight - weights == pytest.approx(2 * (four - weights), rel=0.01)
    amp, checkpointed = (step_bytes(*parts(name, 4, key, "True")) for key in ("AMP", "TRAIN.USE_CHECKPOINT"))
    assert weights < checkpointed < four  # type: ignore[operator]
    assert weights < amp < four  # type: ignore[operator]


@pytest.mark.parametrize(
    ("gib", "local", "expected"),
    [
        (
            0.05,
            1,
            "a step with DATA.BATCH_SIZE 64 .* about 0.1 GiB of memory, and 0.0 GiB are free: add --amp, or",
        ),
        (0.05, 1, "lower --batch-size .for example to 32; --opts TRAIN.ACCUMULATION_STEPS 2 keeps the global batch"),
        (100, 1, ""),
        (0.4, 1, ""),
        (0.4, 8, "needs about 0.. GiB"),  # eight processes on this machine
        (None, 1, ""),
    ],
)
def test_warning(monkeypatch: pytest.MonkeyPatch, gib: float | None, local: int, expected: str) -> None:
    monkeypatch.setattr(memory_check, "available_bytes", lambda _: None if gib is None else int(gib * 2**30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    text = memory_warning(*parts("classification", 64))
    assert bool(text) == bool(expected)
    assert re.search(expected, text)


def test_what_cannot_be_estimated_has_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Callable[[], object]:
        raise NotImplementedError

    monkeypatch.setattr(Classification, "training_forward", fail)
    assert step_bytes(*parts("classification", 64)) is None

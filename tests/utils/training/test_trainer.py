"""What the run loop leaves for TensorBoard beside an epoch's figures."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.soak import SETTINGS
from utils.logs.logger import logger
from utils.training.trainer import Trainer


def test_pictures_and_histograms_each_few_epochs(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the second and the last of three epochs."""
    monkeypatch.setattr("utils.training.trainer.MIN_IMAGE_SECONDS", 0.0)
    words = ["--cfg", "cfgs/digits.yaml", "--output", tmp_path, "--batch-size", "128", "--opts", *SETTINGS]
    words += ["TRAIN.EPOCHS", "3", "LOG.PICTURE_EPOCHS", "2", "DATA.NUM_WORKERS", "0"]
    assert run_main(*words)[0] == 0
    events = EventAccumulator(str(tmp_path / "mlla_digits" / "default"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Images("predictions")] == [1, 2]
    names = events.Tags()["histograms"]
    assert names == [f"weights/{name}" for name in ("patch_embed", *(f"layers.{i}" for i in range(4)), "norm", "head")]
    for name in names:
        recorded = events.Histograms(name)
        assert [event.step for event in recorded] == [1, 2]
        assert all(len(event.histogram_value.bucket) <= 66 for event in recorded)


@pytest.mark.parametrize(
    ("every", "seconds", "expected"), [(2, 0.0, [1, 3, 4]), (0, 0.0, [4]), (1, 300.0, [4])], ids=["2", "0", "short"]
)
def test_when_pictures_are_due(
    every: int, seconds: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each few of five epochs, and after the last; in between not where they take less than five minutes."""
    monkeypatch.setattr("utils.training.trainer.MIN_IMAGE_SECONDS", seconds)
    trainer = trainer_of_five_epochs(every, lambda _: Path("picture.png"))
    for epoch in range(5):
        Trainer.add_details(trainer, epoch)
    assert trainer.drawn == [(epoch, Path("picture.png")) for epoch in expected]


def test_a_picture_that_fails_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: nn.Module) -> Path:
        raise torch.OutOfMemoryError("no\nmemory")

    logger.addHandler(caplog.handler)
    trainer = trainer_of_five_epochs(0, fail)
    Trainer.add_details(trainer, 4)
    logger.removeHandler(caplog.handler)
    assert trainer.drawn == [(4, None)]
    assert "predictions could not be drawn (no memory)" in caplog.text


def trainer_of_five_epochs(every: int, draw_predictions: Callable[[nn.Module], Path]) -> Any:
    """What Trainer.add_details looks at; `drawn` is what it hands on."""
    drawn: list[tuple[int, Path | None]] = []
    recorder = SimpleNamespace(add_details=lambda epoch, _, picture: drawn.append((epoch, picture)))
    return SimpleNamespace(
        drawn=drawn,
        recorder=recorder,
        config=SimpleNamespace(total_epochs=5, image_epochs=every),
        state=SimpleNamespace(ema=None, model=nn.Linear(1, 1)),
        draw_predictions=draw_predictions,
        last_image_time=time.monotonic(),
    )

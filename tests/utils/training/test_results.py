"""The last lines of a run's log."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from downstream.detection.task import Detection
from downstream.segmentation.task import Segmentation
from main import Classification
from tests.test_documented_commands import parses
from utils.training.results import best_file, next_commands
from utils.training.task import Task
from utils.training.train_state import Best


@pytest.mark.parametrize("task", [Classification(), Detection(), Segmentation()], ids=lambda task: task.metric)
@pytest.mark.parametrize("image", [None, Path("my photos/a.jpg")])
def test_the_next_commands_can_be_pasted(task: Task, image: Path | None) -> None:
    folder = Path("out put/default")
    run: Any = SimpleNamespace(folder=folder, data=SimpleNamespace(example_image=image))
    predict, export, report = (shlex.split(text) for text in next_commands(task, run, folder / "max.pth"))
    assert predict[3:6] == [str(image or "IMAGE"), "--weights", "out put/default/max.pth"]
    assert export[3] == "out put/default/model.onnx"
    assert report[2:] == ["utils.report", "out put/default"]
    for words in (predict, export, report):
        parses(words)


def test_the_best_file_is_one_that_exists(tmp_path: Path) -> None:
    """The best epoch's file may be in the folder of the run that this one resumed from."""
    task = Classification()
    assert best_file(task, tmp_path, Best(90.0, is_ema=True, epoch=0)) is None
    for name in ("ckpt_epoch_1.pth", "ckpt_epoch_0.pth", "max_acc.pth"):
        (tmp_path / name).touch()
    assert best_file(task, tmp_path, Best(90.0, is_ema=True, epoch=1)) == tmp_path / "ckpt_epoch_1.pth"
    assert best_file(task, tmp_path, Best(90.0, is_ema=False, epoch=1)) == tmp_path / "max_acc.pth"

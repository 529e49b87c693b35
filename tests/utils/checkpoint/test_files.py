import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.checkpoint import files
from utils.checkpoint.files import (
    CheckpointWriter,
    Progress,
    checkpoints_in,
    link_checkpoint,
    move_replaced_checkpoints,
    readable_checkpoints,
    save_checkpoint,
    save_under_names,
)
from utils.checkpoint.rng import restore_rng_state, rng_state
from utils.checkpoint.weights_file import load_checkpoint
from utils.logs.logger import logger

CPU = torch.device("cpu")


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    return next(readable_checkpoints(folder), None)


def run_content(epochs: int, steps: int = 0, **entries: Any) -> dict[str, Any]:
    """Return the least that a run's checkpoint must have."""
    optimizer = {"state": {}, "param_groups": [{"params": [0]}]}
    content = {"model": {"w": torch.ones(2)}, "optimizer": optimizer, "epoch": epochs - 1, "steps": steps}
    return {**content, **entries}


def test_checkpoints_are_sorted_by_number(tmp_path: Path) -> None:
    for epoch in (9, 10, 2):
        save_checkpoint(tmp_path / f"ckpt_epoch_{epoch}.pth", run_content(epoch + 1))
    save_checkpoint(tmp_path / "max_acc.pth", {"epoch": 99})
    save_checkpoint(tmp_path / "ckpt_epoch_11_step_7.pth", {})
    save_checkpoint(tmp_path / "ckpt_epoch_10_step_70.pth", {})
    assert [progress for progress, _ in checkpoints_in(tmp_path)] == [(11, 7), (11, 0), (10, 70), (10, 0), (3, 0)]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest[1]["epoch"] == 10


def test_unreadable_checkpoints_are_skipped(tmp_path: Path) -> None:
    for epoch in (3, 4):
        save_checkpoint(tmp_path / f"ckpt_epoch_{epoch}.pth", run_content(epoch + 1))
    save_checkpoint(tmp_path / "ckpt_epoch_5.pth", {"model": {}})
    newest = tmp_path / "ckpt_epoch_4.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest[0].name == "ckpt_epoch_3.pth"
    assert load_latest(tmp_path / "empty") is None


def test_a_checkpoint_under_another_name_than_its_own_is_skipped(tmp_path: Path) -> None:
    """Except an official one, whose name counts complete epochs."""
    save_checkpoint(tmp_path / "ckpt_epoch_2.pth", run_content(3))
    save_checkpoint(tmp_path / "ckpt_epoch_3_step_7.pth", run_content(3, 700))
    save_checkpoint(tmp_path / "ckpt_epoch_3.pth", run_content(300))
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest[0].name == "ckpt_epoch_2.pth"
    official = {**run_content(1), "state_dict_ema": None, "epoch": 5}
    del official["steps"]
    save_checkpoint(tmp_path / "ckpt_epoch_5.pth", official)
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest[0].name == "ckpt_epoch_5.pth"


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ckpt_epoch_0.pth"
    save_checkpoint(path, {"epoch": 0})

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"epoch": 1})
    assert load_checkpoint(path) == {"epoch": 0}
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_three_and_the_best_are_kept(tmp_path: Path) -> None:
    for epoch in range(5):
        names = [f"ckpt_epoch_{epoch}.pth", *(["max_acc.pth"] if epoch == 1 else [])]
        save_under_names(tmp_path, Progress(epoch + 1), names, {"epoch": epoch})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ckpt_epoch_2.pth",
        "ckpt_epoch_3.pth",
        "ckpt_epoch_4.pth",
        "latest.json",
        "max_acc.pth",
    ]
    assert load_checkpoint(tmp_path / "max_acc.pth") == {"epoch": 1}


def save_epochs(folder: Path, *epochs: int, keep_all: bool = False) -> None:
    """Save as a run does at the ends of epochs, whose numbers count from 0."""
    for epoch in epochs:
        save_under_names(folder, Progress(epoch + 1), [f"ckpt_epoch_{epoch}.pth"], {"epoch": epoch}, keep_all=keep_all)


def checkpoints(folder: Path) -> set[str]:
    return {path.name.removeprefix("ckpt_epoch_").removesuffix(".pth") for path in folder.glob("ckpt_*.pth")}


@pytest.mark.parametrize("index", [None, "", "[]", '{"checkpoint": "ckpt_epoch_3.pth", "epochs": 4, "steps": 0}'])
def test_files_that_the_run_did_not_write_are_never_deleted(tmp_path: Path, index: str | None) -> None:
    for name in ("1", "2", "3", "3_step_7"):
        save_checkpoint(tmp_path / f"ckpt_epoch_{name}.pth", {"epoch": "foreign"})
    if index is not None:
        (tmp_path / "latest.json").write_text(index)
    save_epochs(tmp_path, *range(4, 9))
    assert checkpoints(tmp_path) == {"1", "2", "3", "3_step_7", "6", "7", "8"}


def test_another_run_in_the_folder_deletes_nothing_of_the_first(tmp_path: Path) -> None:
    save_epochs(tmp_path, 0, 1, 2)
    move_replaced_checkpoints(tmp_path, Progress(3), continues=True)
    save_epochs(tmp_path, 3)
    assert checkpoints(tmp_path) == {"1", "2", "3"}
    move_replaced_checkpoints(tmp_path, Progress(4), continues=False)
    save_epochs(tmp_path, *range(4, 9))
    assert checkpoints(tmp_path) == {"1", "2", "3", "6", "7", "8"}


def test_checkpoints_of_a_higher_save_freq_stay_when_it_is_lowered(tmp_path: Path) -> None:
    save_epochs(tmp_path, 1, 3, 5, keep_all=True)
    save_epochs(tmp_path, *range(6, 10))
    assert checkpoints(tmp_path) == {"1", "3", "5", "7", "8", "9"}


def test_copies_where_links_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, __: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", fail)
    save_checkpoint(tmp_path / "a.pth", {"epoch": 1})
    link_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert load_checkpoint(tmp_path / "b.pth") == {"epoch": 1}


def test_random_number_generators_are_restored(tmp_path: Path) -> None:
    random.random(), np.random.rand(), torch.rand(1)
    save_checkpoint(tmp_path / "rng.pth", {"rng": rng_state(CPU)})
    expected = random.random(), np.random.standard_normal(), torch.rand(1).item()
    restore_rng_state(load_checkpoint(tmp_path / "rng.pth")["rng"], CPU)
    assert (random.random(), np.random.standard_normal(), torch.rand(1).item()) == expected


def written(folder: Path, epochs: int, size: int, *, in_background: bool = True) -> CheckpointWriter:
    """Return a writer that has written the checkpoint of an epoch's end, with `size` numbers in it."""
    writer = CheckpointWriter(folder, in_background=in_background)
    progress, weights = Progress(epochs), torch.full((size,), 1.0)
    writer.write(progress, [progress.checkpoint_name], run_content(epochs, model={"w": weights}))
    weights.fill_(2.0)  # training continues at once, and does not change the copy
    writer.wait()
    return writer


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """A limit of this process's file size simulates the full disk."""
    monkeypatch.setattr(logger, "propagate", True)
    assert not written(tmp_path, 1, 1000, in_background=in_background).has_failed
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        failed = written(tmp_path, 2, 1_000_000, in_background=in_background)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.has_failed
    assert (
        "ckpt_epoch_1.pth could not be saved (File too large); the newest checkpoint is ckpt_epoch_0.pth" in caplog.text
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_epoch_0.pth", "latest.json"]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest[1]["epoch"] == 0
    assert torch.all(latest[1]["model"]["w"] == 1) or not in_background


@pytest.mark.parametrize("in_background", [True, False])
def test_a_best_checkpoint_is_written_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """Before the next checkpoint, from which a run may resume, unless that is a better one."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(tmp_path, in_background=in_background)
    weights = torch.ones(1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_checkpoint", fail)
        names = ["ckpt_epoch_0.pth", "max_acc.pth", "max_ema_acc.pth"]
        writer.write(Progress(1), names, run_content(1, model={"w": weights}))
        writer.wait()
    weights.fill_(2.0)
    writer.write(Progress(2), ["ckpt_epoch_1.pth", "max_acc.pth"], run_content(2, model={"w": weights}))
    writer.wait()
    assert not writer.has_failed
    best = {path.name: load_checkpoint(path)["model"]["w"].item() for path in tmp_path.glob("max_*.pth")}
    assert best == {"max_acc.pth": 2.0, "max_ema_acc.pth": 1.0}
    (tmp_path / "max_ema_acc.pth").unlink()
    writer.write(Progress(3), ["ckpt_epoch_2.pth"], run_content(3))
    writer.wait()
    assert not (tmp_path / "max_ema_acc.pth").exists()  # once


def test_a_failed_link_is_not_a_failed_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(files, "link_checkpoint", fail)
    writer = written(tmp_path, 1, 10)
    writer.write(Progress(2), ["ckpt_epoch_1.pth", "max_acc.pth"], run_content(2))
    writer.wait()
    assert writer.has_failed
    assert (
        "ckpt_epoch_1.pth was saved, but max_acc.pth, latest.json could not be written (No space left on device); the "
        "newest checkpoint is ckpt_epoch_1.pth" in caplog.text
    )


def test_a_missing_folder_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    failed = written(tmp_path / "gone", 1, 10)
    assert failed.has_failed
    assert "No such file or directory" in caplog.text
    (tmp_path / "gone").mkdir()
    progress = Progress(2)
    failed.write(progress, [progress.checkpoint_name], {"epoch": 1})
    failed.wait()
    assert not failed.has_failed


def test_within_an_epoch_only_the_newest_is_kept(tmp_path: Path) -> None:
    for progress in (Progress(1), Progress(1, 4), Progress(1, 8)):
        save_under_names(tmp_path, progress, [progress.checkpoint_name], {})
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["ckpt_epoch_0.pth", "ckpt_epoch_1_step_8.pth"]
    assert json.loads((tmp_path / "latest.json").read_text())["checkpoint"] == "ckpt_epoch_1_step_8.pth"
    save_under_names(tmp_path, Progress(2), ["ckpt_epoch_1.pth"], {})
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth"]

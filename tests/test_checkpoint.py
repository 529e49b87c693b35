import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.checkpoint import (
    Progress,
    checkpoints_in,
    link_checkpoint,
    load_latest,
    save_checkpoint,
    save_under_names,
)
from utils.run_state import restore_rng_state, rng_state
from utils.weights_file import load_checkpoint

CPU = torch.device("cpu")


def test_highest_epoch_by_number_not_by_time_or_text(tmp_path: Path) -> None:
    for epoch in (9, 10, 2):
        save_checkpoint(tmp_path / f"ckpt_epoch_{epoch}.pth", {"epoch": epoch, "model": {}, "optimizer": {}})
    save_checkpoint(tmp_path / "max_acc.pth", {"epoch": 99})
    save_checkpoint(tmp_path / "ckpt_epoch_11_step_7.pth", {})
    save_checkpoint(tmp_path / "ckpt_epoch_10_step_70.pth", {})
    assert [progress for progress, _ in checkpoints_in(tmp_path)] == [(11, 7), (11, 0), (10, 70), (10, 0), (3, 0)]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest[1]["epoch"] == 10


def test_a_torn_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for epoch in (3, 4):
        content = {"epoch": epoch, "optimizer": {}, "model": {"w": torch.zeros(999)}}
        save_checkpoint(tmp_path / f"ckpt_epoch_{epoch}.pth", content)
    save_checkpoint(tmp_path / "ckpt_epoch_5.pth", {"model": {}})
    newest = tmp_path / "ckpt_epoch_4.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest[0].name == "ckpt_epoch_3.pth"
    assert load_latest(tmp_path / "empty") is None


def test_a_failed_save_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ckpt_epoch_0.pth"
    save_checkpoint(path, {"epoch": 0})

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"epoch": 1})
    assert load_checkpoint(path) == {"epoch": 0}
    assert list(tmp_path.iterdir()) == [path]


def test_newest_three_and_the_best_are_kept(tmp_path: Path) -> None:
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


def test_copies_where_links_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, __: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", fail)
    save_checkpoint(tmp_path / "a.pth", {"epoch": 1})
    link_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert load_checkpoint(tmp_path / "b.pth") == {"epoch": 1}


def test_random_number_generators_go_through_a_checkpoint(tmp_path: Path) -> None:
    random.random(), np.random.rand(), torch.rand(1)
    save_checkpoint(tmp_path / "rng.pth", {"rng": rng_state(CPU)})
    expected = random.random(), np.random.standard_normal(), torch.rand(1).item()
    restore_rng_state(load_checkpoint(tmp_path / "rng.pth")["rng"], CPU)
    assert (random.random(), np.random.standard_normal(), torch.rand(1).item()) == expected

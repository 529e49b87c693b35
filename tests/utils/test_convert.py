"""Conversions and back, bit for bit; impossible ones are refused."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from yacs.config import CfgNode

from models import MLLA, mlla_tiny
from models.mlla import DERIVED_KEY_SUFFIX
from tests.helpers import GOLDEN, MICRO, exit_code, run_python
from tests.utils.training.test_train_step import GoldenRun
from utils.checkpoint.files import Progress, progress_in
from utils.checkpoint.weights import read_weights
from utils.checkpoint.weights_file import load_checkpoint
from utils.convert import main
from utils.distributed.process import Process
from utils.training.train_state import TrainState

SMALL = {**MICRO, "img_size": 64, "num_classes": 3}
THIN: dict[str, Any] = {"num_classes": 3, "embed_dim": 8, "num_heads": (1, 1, 1, 1)}
Content = dict[str, Any]
OFFICIAL_STATE = {"optimizer", "lr_scheduler", "max_accuracy", "max_accuracy_e", "epoch", "config"}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of this project with random weights, which rounding would change."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ours") / "ckpt_epoch_3.pth"
    model, ema = MLLA(**SMALL), MLLA(**SMALL)
    model.patch_embed.conv1.norm.num_batches_tracked += 7
    content = {"model": model.state_dict(), "state_dict_ema": ema.state_dict(), "optimizer": {"state": {}}}
    metadata = {"epoch": 3, "classes": ["cat", "dog", "eel"], "config": "DATA:\n  IMG_SIZE: 64\nSEED: 1\n"}
    torch.save({**content, **metadata}, path)
    return path


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Compare names, dtypes, shapes and bits."""
    assert set(one) == set(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert value.shape == other[name].shape
        assert value.numpy().tobytes() == other[name].contiguous().numpy().tobytes()


def convert(source: Path, target: Path, form: str, *args: str) -> Content:
    assert main([str(source), str(target), "--to", form, *args]) == 0
    return load_checkpoint(target)


def test_official_format_and_back(ours: Path, tmp_path: Path) -> None:
    before = load_checkpoint(ours)
    official = convert(ours, tmp_path / "official.pth", "official")
    after = convert(tmp_path / "official.pth", tmp_path / "ours.pth", "ours")
    again = convert(tmp_path / "ours.pth", tmp_path / "again.pth", "official")
    assert set(official) == set(after) == {"model", "state_dict_ema", "classes", "config"}
    for kind in ("model", "state_dict_ema"):
        assert_same(before[kind], after[kind])
        assert_same(official[kind], again[kind])
        assert set(official[kind]) - set(before[kind]) == {
            f"layers.{stage}.blocks.{block}.attn.rope.rotations"
            for stage, depth in enumerate(MICRO["depths"])
            for block in range(depth)
        }
    assert (after["classes"], after["config"]) == (before["classes"], before["config"])


def slow_rotations(height: int, width: int, channels: int) -> np.ndarray:
    """Return cosines and sines of each pair's angle by the definition: (H, W, C / 2, 2)."""
    table = np.zeros((height, width, channels // 2, 2))
    num_frequencies = channels // 4
    for row in range(height):
        for column in range(width):
            for pair in range(channels // 2):
                position = row if pair < num_frequencies else column
                angle = position * 10000 ** (-(pair % num_frequencies) / num_frequencies)
                table[row, column, pair] = np.cos(angle), np.sin(angle)
    return table


@pytest.mark.parametrize(("args", "size"), [([], (64, 64)), (["--size", "96", "160"], (96, 160))])
def test_rotary_tables(ours: Path, tmp_path: Path, args: list[str], size: tuple[int, int]) -> None:
    official = convert(ours, tmp_path / "official.pth", "official", *args)["model"]
    for stage, depth in enumerate(MICRO["depths"]):
        for block in range(depth):
            table = official[f"layers.{stage}.blocks.{block}.attn.rope.rotations"]
            height, width, channels = size[0] >> 2 + stage, size[1] >> 2 + stage, 32 << stage
            assert table.dtype == torch.float32
            assert table.shape == (height, width, channels // 2, 2)
            np.testing.assert_allclose(table.numpy(), slow_rotations(height, width, channels), atol=2e-6)


class OfficialRope(nn.Module):
    """A module with the official classifier's table, by its known name and shape."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("rotations", torch.zeros(height, width, channels // 2, 2))


def test_a_model_with_the_official_buffers_loads_it_strictly(ours: Path, tmp_path: Path) -> None:
    convert(ours, tmp_path / "official.pth", "official")
    model = MLLA(**SMALL)
    model._load_state_dict_pre_hooks.clear()  # ours, which skips the tables
    for stage, layers in enumerate(model.layers):
        for block in layers.blocks:
            block.attn.add_module("rope", OfficialRope(16 >> stage, 16 >> stage, 32 << stage))
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    model.load_state_dict(content["model"], strict=True)
    assert model.layers[0].blocks[0].attn.rope.rotations[0, 0, 0].tolist() == [1.0, 0.0]


def test_an_official_training_checkpoint(ours: Path, tmp_path: Path) -> None:
    """The configuration is a yacs CfgNode and gives the image size."""
    before = load_checkpoint(ours)
    config = CfgNode({"DATA": {"IMG_SIZE": 128}, "MODEL": {"MLLA": {"DEPTHS": [1, 1, 2, 1]}}, "BETAS": (0.9, 0.999)})
    torch.save({"model": before["model"], "config": config, "epoch": 3}, tmp_path / "w.pth")
    converted = convert(tmp_path / "w.pth", tmp_path / "ours.pth", "ours")
    assert yaml.safe_load(converted["config"]) == {**config, "BETAS": [0.9, 0.999]}
    official = convert(tmp_path / "ours.pth", tmp_path / "official.pth", "official")
    assert official["model"]["layers.0.blocks.0.attn.rope.rotations"].shape == (32, 32, 16, 2)
    del official["config"]
    torch.save(official, tmp_path / "bare.pth")
    again = convert(tmp_path / "bare.pth", tmp_path / "again.pth", "official")
    assert_same(official["model"], again["model"])  # the size follows from the tables


@pytest.mark.parametrize("args", [[], ["--ema"]])
def test_safetensors_and_back(ours: Path, tmp_path: Path, args: list[str]) -> None:
    before = load_checkpoint(ours)
    convert(ours, tmp_path / "w.safetensors", "safetensors", *args)
    after = convert(tmp_path / "w.safetensors", tmp_path / "ours.pth", "ours")
    assert_same(before["state_dict_ema" if args else "model"], after["model"])
    assert "state_dict_ema" not in after
    assert (after["classes"], after["config"]) == (before["classes"], before["config"])


@pytest.mark.parametrize("form", ["official", "timm", "ours"])
def test_ema_weights_only(ours: Path, tmp_path: Path, form: str) -> None:
    before = load_checkpoint(ours)
    convert(ours, tmp_path / "w.pth", form, "--ema")
    after = convert(tmp_path / "w.pth", tmp_path / "ours.pth", "ours")
    assert_same(before["state_dict_ema"], after["model"])
    assert "state_dict_ema" not in after
    torch.save({"state_dict_ema": before["state_dict_ema"]}, tmp_path / "ema.pth")
    convert(tmp_path / "ema.pth", tmp_path / "w2.pth", form)
    assert_same(before["state_dict_ema"], convert(tmp_path / "w2.pth", tmp_path / "o.pth", "ours")["state_dict_ema"])


def test_other_dtypes_keep_their_bits(tmp_path: Path) -> None:
    weights = {"a": torch.tensor([1.1, -0.0]).bfloat16(), "b": torch.tensor([float("nan")]), "c": torch.tensor(2**60)}
    torch.save({"model": {**weights, "view": torch.arange(6.0).reshape(2, 3).t()}}, tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "w.safetensors", "safetensors")
    converted = convert(tmp_path / "w.safetensors", tmp_path / "o.pth", "timm")["state_dict"]
    assert converted["a"].view(torch.int16).equal(weights["a"].view(torch.int16))
    assert converted["b"].isnan().all()
    assert converted["c"].item() == 2**60
    assert converted["view"].equal(torch.arange(6.0).reshape(2, 3).t())


def test_timm_loads_its_format_strictly(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, ema = mlla_tiny(**THIN), mlla_tiny(**THIN)
    content = {"model": model.state_dict(), "state_dict_ema": ema.state_dict()}
    rotations = {f"layers.0.blocks.0.{DERIVED_KEY_SUFFIX}": torch.zeros(56, 56, 4, 2)}
    torch.save({**content, "model": {**content["model"], **rotations}}, tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "timm.pth", "timm")
    loaded = timm.create_model("mlla_tiny", **THIN, checkpoint_path=str(tmp_path / "timm.pth"))
    assert_same(loaded.state_dict(), ema.state_dict())  # timm prefers the EMA
    convert(tmp_path / "w.pth", tmp_path / "timm.safetensors", "safetensors")
    loaded = timm.create_model("mlla_tiny", **THIN, checkpoint_path=str(tmp_path / "timm.safetensors"))
    assert_same(loaded.state_dict(), model.state_dict())


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "utils.convert", *args, forked=True)


@pytest.mark.slow
def test_the_command(ours: Path, tmp_path: Path) -> None:
    target = tmp_path / "w.pth"
    done = run(ours.as_uri(), target, "--to", "official")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{target}: model and state_dict_ema, 192 tensors each, format 'official', for images of 64x64\n"
    )


def test_existing_files_need_force(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "w.pth"
    target.write_text("mine")
    assert exit_code(main, [str(ours), str(target), "--to", "ours"]) == 2
    assert (
        capsys.readouterr().err == f"error: {target}: already exists; name another file, or replace it with --force\n"
    )
    assert target.read_text() == "mine"
    convert(ours, target, "ours", "--force")
    convert(target, target, "timm", "--force")  # onto itself
    assert list(load_checkpoint(target))[:2] == ["state_dict", "state_dict_ema"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_keeps_the_previous_file(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "w.pth"
    target.write_text("mine")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    for name, form in (("w.pth", "ours"), ("w.safetensors", "safetensors")):
        assert exit_code(main, [str(ours), str(tmp_path / name), "--to", form, "--force"]) == 2
        assert "No space left" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["out.pth", "--to", "safetensors"], r"must end in \.safetensors"),
        (["out.safetensors", "--to", "ours"], r"must end in \.safetensors"),
        (["none/out.pth", "--to", "ours"], "there is no folder"),
        (["out.pth", "--to", "ours", "--size", "64", "64"], "--size works with --to official"),
        (["out.pth", "--to", "ours", "--training-state"], "--training-state works with --to official"),
        (["out.pth", "--to", "official", "--ema", "--training-state"], "without --ema"),
        (["out.pth", "--to", "official", "--training-state"], "not a complete checkpoint of a run"),
        (
            ["out.pth", "--to", "official", "--size", "64", "70"],
            "64x70 pixels: the official classifier needs multiples",
        ),
    ],
)
def test_mistakes(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert exit_code(main, [str(ours), str(tmp_path / args[0]), *args[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not list(tmp_path.iterdir())


def test_mistakes_in_the_file(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_checkpoint(ours)["model"]
    torch.save({"model": model}, tmp_path / "model.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for args, message in (
        (
            ["model.pth", "out.pth", "--to", "ours", "--ema"],
            "has no EMA weights (state_dict_ema); leave out --ema",
        ),
        (["other.pth", "out.pth", "--to", "official"], "not an MLLA classifier"),
        (["none.pth", "out.pth", "--to", "ours"], "found epoch"),
        (["absent.pth", "out.pth", "--to", "ours"], "no such checkpoint file"),
    ):
        assert exit_code(main, [str(tmp_path / args[0]), str(tmp_path / args[1]), *args[2:]]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
def test_the_official_code_continues_a_run(tmp_path: Path) -> None:
    """One epoch here, then one as the official code resumes and trains: with torch's AdamW and timm's scheduler.

    Losses, gradient norms and rates are those that were recorded of the official code's whole run.
    """
    golden, run = np.load(GOLDEN / "mlla_micro_64_trajectory.npz"), GoldenRun()
    for step in range(2):
        run.take(step)
    state = TrainState(run.model, run.ema, run.optimizer, run.precision.scaler, Process(0, 1, torch.device("cpu")))
    state.progress, state.global_batch_size, state.best, state.best_ema = Progress(1), 8, 50.0, 40.0
    metadata = {"config": run.config.dump(), "classes": list("abcdefghij"), "num_train_images": 16}
    torch.save(state.capture(**metadata), tmp_path / "ckpt_epoch_0.pth")
    official = convert(tmp_path / "ckpt_epoch_0.pth", tmp_path / "w.pth", "official", "--training-state")
    assert set(official) == OFFICIAL_STATE | {"model", "state_dict_ema", "classes", "scores"}
    assert (official["epoch"], official["max_accuracy"], official["max_accuracy_e"]) == (1, 50.0, 40.0)
    assert official["config"]["TRAIN"]["EPOCHS"] == 12
    assert progress_in(official) == state.progress
    assert read_weights(tmp_path / "w.pth").ema is not None

    model = MLLA(**MICRO, num_classes=10).train()
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2]}]
    optimizer = torch.optim.AdamW([groups[0], {**groups[1], "weight_decay": 0.0}], lr=1e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=24, lr_min=1e-5, warmup_t=4, warmup_lr_init=1e-6, t_in_epochs=False
    )
    assert set(official["lr_scheduler"]) == set(scheduler.state_dict())
    assert {key: pytest.approx(value) for key, value in scheduler.state_dict().items()} == official["lr_scheduler"]
    model.load_state_dict(official["model"])
    optimizer.load_state_dict(official["optimizer"])
    scheduler.load_state_dict(official["lr_scheduler"])
    for step in range(2 * official["epoch"], 4):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(golden["lrs"][step])
        images, targets = run.batch(step)
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        scheduler.step_update(step)
        assert loss.item() == pytest.approx(golden["losses"][step])
        assert norm.item() == pytest.approx(golden["grad_norms"][step])

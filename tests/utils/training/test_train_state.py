from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.checkpoint.files import Progress
from utils.checkpoint.weights_file import CheckpointError
from utils.distributed.process import Process
from utils.logs.logger import logger
from utils.training.amp import make_precision
from utils.training.ema import ModelEma
from utils.training.optimizer import make_optimizer, parameter_groups
from utils.training.train_state import TrainState

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _log_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "propagate", True)


def make_state(optimizer: str = "adamw", width: int = 4) -> TrainState:
    model = nn.Linear(3, width)
    scaler = make_precision(CPU, amp=True, dtype="float16").scaler
    groups = parameter_groups(model, 0.05)
    return TrainState(model, ModelEma(model, 0.9), make_optimizer(optimizer, groups), scaler, Process(0, 1, CPU))


def stepped(state: TrainState) -> TrainState:
    """After a step that overflowed, so that the scale is no longer that of a fresh scaler, and one that did not."""
    for value in (float("inf"), 1.0):
        state.scaler.scale(state.model(torch.full((2, 3), value)).sum()).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
    assert state.ema is not None
    state.ema.update()
    state.progress, state.best, state.best_ema, state.sums = Progress(5, 3), 61.0, 62.0, {"loss": 1 / 3}
    state.ema.scores = {"model": 60.0, "EMA": 55.5}
    return state


def test_everything_comes_back() -> None:
    state, fresh = stepped(make_state()), make_state()
    content = state.capture(config="text")
    fresh.restore(content, "file.pth")
    assert fresh.scaler.get_scale() == state.scaler.get_scale() == 2.0**15
    assert (fresh.progress, fresh.best, fresh.best_ema, fresh.sums) == ((5, 3), 61.0, 62.0, {"loss": 1 / 3})
    assert fresh.ema is not None
    assert fresh.ema.scores == {"model": 60.0, "EMA": 55.5}
    model, description = fresh.better_model()
    assert model is fresh.model
    assert description == "model weights (score of the model 60.00, of the EMA 55.50)"
    again = fresh.capture(config="text")
    assert str(again) == str(content)


def test_weights_alone_start_afresh() -> None:
    state, fresh = stepped(make_state()), make_state()
    fresh.restore({"model": state.model.state_dict()}, "file.pth")
    assert fresh.progress == (0, 0)
    assert fresh.ema is not None
    assert fresh.ema.module.weight.equal(state.model.weight)  # type: ignore[arg-type, operator, union-attr]


def test_what_does_not_fit() -> None:
    content = stepped(make_state()).capture()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        make_state(width=5).restore(content, "file.pth")
    with pytest.raises(CheckpointError, match=r"another TRAIN.OPTIMIZER.NAME"):
        make_state("sgd").restore(content, "file.pth")
    del content["epoch"]
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        make_state().restore(content, "file.pth")
    for part in ({"optimizer": None}, {"ranks": None}, {"ranks": [{}]}, {"epoch": "5"}, {"max_accuracy": None}):
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            make_state().restore({**content, "epoch": 5, **part}, "file.pth")
    with pytest.raises(CheckpointError, match="found epoch, lr"):
        make_state().restore({"epoch": 1, "lr": 2}, "file.pth")


def test_classes_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    content = stepped(make_state()).capture(classes=["a", "b", "c", "d"])
    state = make_state()
    state.restore(content, "file.pth")
    state.classes = ["a", "b", "c", "d"]
    state.restore(content, "file.pth")
    assert "classes" not in caplog.text
    state.classes = ["a", "x", "c", "y"]
    state.restore(content, "file.pth")
    assert "was trained on other classes than the data has, 2 of 4 differ: 1 was b, is x, 3 was d, is y" in caplog.text
    state.classes = ["a", "b"]
    with pytest.raises(CheckpointError, match=r"was trained on 4 classes \(a, b, c, ...\), the data has 2"):
        state.restore(content, "file.pth")


class Reordered(nn.Module):
    """Two layers of one shape, whose parameters come in the order that is asked for."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(3, 3))
        self.add_module("norm", nn.LayerNorm(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x) * 2 + self.second(x)).square()


def test_the_optimizer_of_a_model_with_its_parameters_in_another_order(caplog: pytest.LogCaptureFixture) -> None:
    """Official checkpoints may have another order; the next step must equal the saved run's."""

    def fresh(*names: str) -> TrainState:
        model = Reordered(*names)
        optimizer = make_optimizer("adamw", parameter_groups(model, 0.05))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        return TrainState(
            model, None, optimizer, make_precision(CPU, amp=False, dtype="auto").scaler, Process(0, 1, CPU)
        )

    def step(state: TrainState) -> None:
        images = torch.arange(12.0).reshape(4, 3).sin()
        state.optimizer.zero_grad()
        state.model(images)[:, 0].sum().backward()
        state.optimizer.step()

    torch.manual_seed(0)
    saved, resumed = fresh("second", "first"), fresh("first", "second")
    for _ in range(3):
        step(saved)
    content = deepcopy(saved.capture())
    # As torch before 1.12 wrote it, and without what only this project's files have.
    for entry in content["optimizer"]["state"].values():
        entry["step"] = int(entry["step"])
    for group in content["optimizer"]["param_groups"]:
        del group["fused"]
        group["weight_decay"] = group["lr"] = 9.0
    for name in ("ranks", "scaler", "steps", "images_per_step", "origin", "versions"):
        del content[name]
    content["state_dict_ema"] = content["model"]
    resumed.restore({**content, "epoch": 2, "lr_scheduler": {}, "config": {}}, "official.pth")
    assert "official.pth contains no states of random number generators" in caplog.text
    assert resumed.progress == (2, 0)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.05
    for _ in range(2):
        step(saved)
        step(resumed)
    for name, value in saved.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_other_images_a_step_are_refused_within_an_epoch() -> None:
    content = stepped(make_state()).capture()
    fresh = make_state()
    fresh.global_batch_size = 7
    with pytest.raises(CheckpointError, match=r"with global batch size 1, now it is 7; set DATA\.BATCH_SIZE"):
        fresh.restore(content, "file.pth")
    fresh.restore({**content, "steps": 0}, "file.pth")  # at the end of an epoch it is possible


def test_shares_of_other_processes_are_added_up() -> None:
    content = stepped(make_state()).capture()
    content["ranks"] = [{**content["ranks"][0], "sums": {"loss": value}} for value in (1.5, 2.25)]
    fresh = make_state()
    fresh.restore(content, "file.pth")
    assert fresh.sums == {"loss": 3.75}
    assert fresh.progress == (5, 3)


def test_the_same_command_goes_on_with_the_run_that_began_from_its_file(tmp_path: Path) -> None:
    """--resume FILE again, after a kill, is not another start; with another file of that name it is."""
    file, folder = tmp_path / "start.pth", tmp_path / "run"
    folder.mkdir()
    torch.save(stepped(make_state()).capture(), file)
    first = make_state()
    assert not first.resume(folder, explicit=str(file), auto=True)
    first.progress = Progress(6)
    torch.save(first.capture(), folder / first.progress.checkpoint_name)
    again = make_state()
    assert again.resume(folder, explicit=str(file), auto=True)
    assert again.progress == (6, 0)
    torch.save({**stepped(make_state()).capture(), "other": 1}, file)
    assert not again.resume(folder, explicit=str(file), auto=True)
    assert again.progress == (5, 3)

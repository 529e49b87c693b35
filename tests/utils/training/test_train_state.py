import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from utils.checkpoint.files import Progress
from utils.checkpoint.run_content import DamagedCheckpointError
from utils.checkpoint.weights_file import CheckpointError
from utils.distributed.process import Process
from utils.logs.logger import logger
from utils.training.amp import make_precision
from utils.training.ema import ModelEma
from utils.training.optimizer import make_optimizer, parameter_groups
from utils.training.train_state import TrainState

CPU = torch.device("cpu")


WHOLE: dict[str, Any] = {}  # a checkpoint's content


@pytest.fixture(autouse=True, scope="module")
def _content() -> None:
    WHOLE.update(deepcopy(stepped(make_state()).capture()))


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
    state.ema.scores, state.best_epochs = {"model": 60.0, "EMA": 55.5}, {"model": 3, "EMA": 4}
    return state


def test_everything_comes_back() -> None:
    state, fresh = stepped(make_state()), make_state()
    content = state.capture(config="text")
    fresh.restore(content, "file.pth")
    assert fresh.scaler.get_scale() == state.scaler.get_scale() == 2.0**15
    assert (fresh.progress, fresh.best, fresh.best_ema, fresh.sums) == ((5, 3), 61.0, 62.0, {"loss": 1 / 3})
    assert fresh.best_so_far() == (62.0, True, 4)
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
    with pytest.raises(CheckpointError, match="found epoch, lr"):
        make_state().restore({"epoch": 1, "lr": 2}, "file.pth")


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that replaces an entry of nested dictionaries and lists."""

    def apply(content: dict[str, Any]) -> None:
        place: Any = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return apply


MOMENT = ("optimizer", "state", 0, "exp_avg")
RNG = ("ranks", 0, "rng")
DAMAGE = {
    **{f"no {key}": (lambda content, key=key: content.pop(key)) for key in ("epoch", "model")},
    **{f"model {value}": put(value, "model") for value in (None, {}, [])},
    "meta model": put({"weight": torch.zeros(4, 3, device="meta"), "bias": torch.zeros(4)}, "model"),
    "EMA list": put([1], "state_dict_ema"),
    "EMA meta": put(torch.zeros(4, 3, device="meta"), "state_dict_ema", "weight"),
    **{f"optimizer {value}": put(value, "optimizer") for value in (None, {}, "x")},
    "no groups": put([], "optimizer", "param_groups"),
    "group twice": put([0], "optimizer", "param_groups", 1, "params"),
    "0-d moment": put(torch.tensor(0.0), *MOMENT),
    "small moment": put(torch.zeros(1), *MOMENT),
    "turned moment": put(torch.zeros(3, 4), *MOMENT),
    "whole moment": put(torch.zeros(4, 3, dtype=torch.int64), *MOMENT),
    "complex moment": put(torch.zeros(4, 3, dtype=torch.complex64), *MOMENT),
    "meta moment": put(torch.zeros(4, 3, device="meta"), *MOMENT),
    "sparse moment": put(torch.zeros(4, 3).to_sparse(), *MOMENT),
    "list as moment": put([0.0], *MOMENT),
    "no second moment": put({"step": torch.tensor(1.0), "exp_avg": torch.zeros(4, 3)}, *MOMENT[:-1]),
    "no step": put({"exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)}, *MOMENT[:-1]),
    **{f"step {value}": put(value, *MOMENT[:-1], "step") for value in (-1.0, math.inf, "x", torch.tensor(math.nan))},
    **{f"epoch {v}": put(v, "epoch") for v in (0.5, math.nan, -7, 1e30, 10**30, "5", True, torch.tensor(1))},
    **{f"steps {value}": put(value, "steps") for value in ("3", -1, 2.0, None)},
    **{f"images {value}": put(value, "images_per_step") for value in (0, "8", 1.5)},
    "training images": put(-3, "num_train_images"),
    **{f"best {value}": put(value, "max_accuracy") for value in (None, "x", math.nan, [1.0])},
    **{f"best {value}": put(value, "best_epochs") for value in (None, [1], {"x": 1}, {"model": 0}, {"EMA": "1"})},
    **{f"scores {value}": put(value, "scores") for value in ([1], {"model": 1.0}, {"model": "x", "EMA": 1.0})},
    "scaler": put("x", "scaler"),
    **{f"scale {value}": put(value, "scaler", "scale") for value in (math.nan, 0.0, -1.0, "x")},
    **{f"ranks {value}": put(value, "ranks") for value in (None, [{}], 3)},
    **{f"sums {value}": put(value, "ranks", 0, "sums") for value in ({"loss": "x"}, {"loss": math.nan}, {3: 1.0}, 4)},
    "rng": put(None, *RNG),
    "short torch state": put(torch.zeros(7, dtype=torch.uint8), *RNG, "torch"),
    "empty torch state": put(torch.zeros(5056, dtype=torch.uint8), *RNG, "torch"),
    "CUDA state": put(torch.zeros(3), *RNG, "cuda"),
    "Python state": put([3, [1, 2], None], *RNG, "python"),
    "Python position": put(10**6, *RNG, "python", 1, 624),
    "Python normal": put("x", *RNG, "python", 2),
    **{f"NumPy position {value}": put(value, *RNG, "numpy", 2) for value in (-1, 10**6, "x")},
    "NumPy words": put(torch.zeros(624), *RNG, "numpy", 1),
    "NumPy large words": put(torch.full((624,), 2**40), *RNG, "numpy", 1),
    "NumPy few words": put(torch.zeros(5, dtype=torch.int64), *RNG, "numpy", 1),
    "NumPy name": put("PCG64", *RNG, "numpy", 0),
    "origin": put({"source": [1]}, "origin"),
    "versions": put("2.6", "versions"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_no_part_of_a_checkpoint_is_trusted(damage: Callable[[dict[str, Any]], object]) -> None:
    """A misfit is one line, before anything is restored, and not a crash of the fused optimizer at the next step."""
    content = deepcopy(WHOLE)
    damage(content)
    state = make_state()
    before = str(state.capture())
    with pytest.raises(DamagedCheckpointError, match=r"file\.pth: not a complete checkpoint of a run") as caught:
        state.restore(content, "file.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert str(state.capture()) == before


def test_moments_get_memory_of_their_own() -> None:
    """As the parameter's lies: fused AdamW goes through the memory of one value with stride 0 as if it were all."""
    content = deepcopy(WHOLE)
    put(torch.full((1,), 0.25).expand(4, 3), *MOMENT)(content)
    put(torch.arange(12.0).reshape(3, 4).T, *MOMENT[:-1], "exp_avg_sq")(content)
    state = make_state()
    state.restore(content, "file.pth")
    entry = state.optimizer.state[state.model.weight]  # type: ignore[index]
    assert entry["exp_avg"].stride() == entry["exp_avg_sq"].stride() == (3, 1)
    assert entry["exp_avg"].equal(torch.full((4, 3), 0.25))
    assert entry["exp_avg_sq"][0].tolist() == [0, 4, 8]
    entry["exp_avg"][0, 0] = 1
    assert entry["exp_avg"][0, 1] == 0.25


@pytest.mark.parametrize("damage", [put(torch.tensor(0.0), *MOMENT), put("x", "steps"), put(-7, "epoch")])
def test_a_damaged_checkpoint_is_skipped_for_an_older_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[dict[str, Any]], object]
) -> None:
    older = {**deepcopy(WHOLE), "epoch": 1, "steps": 0}
    newer = deepcopy(WHOLE)
    damage(newer)
    torch.save(older, tmp_path / "ckpt_epoch_1.pth")
    torch.save(newer, tmp_path / "ckpt_epoch_5_step_3.pth")
    state = make_state()
    assert state.resume(tmp_path, explicit="", auto=True)
    assert state.progress == (2, 0)
    assert "skipped a checkpoint" in caplog.text
    with pytest.raises(DamagedCheckpointError):
        make_state().resume(tmp_path, explicit=str(tmp_path / "ckpt_epoch_5_step_3.pth"), auto=True)
    (tmp_path / "ckpt_epoch_1.pth").unlink()
    fresh = make_state()
    assert not fresh.resume(tmp_path, explicit="", auto=True)
    assert fresh.progress == (0, 0)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.bool, torch.int32, torch.uint16, torch.float8_e4m3fn], ids=str
)
def test_numbers_of_another_type_are_refused(dtype: torch.dtype) -> None:
    weights = {"weight": torch.ones(4, 3).to(dtype), "bias": torch.ones(4)}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"1 of another type: weight {name} where the model has float32"):
        make_state().restore({"model": weights}, "file.pth")
    make_state().restore({"model": {**weights, "weight": torch.ones(4, 3, dtype=torch.float16)}}, "file.pth")


@pytest.mark.parametrize("value", [None, {}, []])
def test_the_emas_weights_do_not_replace_missing_ones(value: Any) -> None:
    ema = make_state().model.state_dict()
    with pytest.raises(CheckpointError, match=r"has no weights under model, only the EMA's"):
        make_state().restore({"model": value, "state_dict_ema": ema}, "file.pth")


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_batch_size": 7}, r"with global batch size 1, now it is 7; set DATA\.BATCH_SIZE"),
        ({"num_train_images": 49}, r"with number of training images 50, now it is 49; restore the training images"),
        ({"steps_per_epoch": 2}, r"after step 3 of an epoch, which now has 2 steps"),
    ],
)
def test_other_images_are_refused_within_an_epoch(
    changed: dict[str, int], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = {**stepped(make_state()).capture(), "num_train_images": 50}
    fresh = make_state()
    for name, value in changed.items():
        setattr(fresh, name, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        fresh.restore(content, "file.pth")
    assert not isinstance(caught.value, DamagedCheckpointError)  # or an older checkpoint would be taken
    fresh.restore({**content, "steps": 0}, "file.pth")  # at the end of an epoch it is possible
    assert ("changed from" in caplog.text) == ("steps_per_epoch" not in changed)
    for name in ("num_train_images", "images_per_step"):  # of an older version, or another program
        content.pop(name)
    fresh.steps_per_epoch = 3
    fresh.restore(content, "file.pth")


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

"""The run that all tasks share, around a fake task: a linear model that learns to double eight numbers."""

import contextlib
import itertools
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from config import load_config
from tests.faults.runs import is_same
from tests.helpers import exit_code
from utils.checkpoint.weights_file import load_checkpoint
from utils.distributed.process import Process
from utils.logs.process_clock import StartClock
from utils.training.derived import Derived
from utils.training.ema import ModelEma
from utils.training.optimizer import parameter_groups
from utils.training.run import prepare_model, run_task
from utils.training.task import Run, Task
from utils.training.train_step import ComputeLosses
from utils.training.training_run import Training

CPU = torch.device("cpu")
NUMBERS = torch.arange(8.0)[:, None]  # (8, 1)


@dataclass
class ConstantSchedule:
    base_lr: float

    def lr_at(self, _: int) -> float:
        return self.base_lr


class FakeTask(Task):
    """Records its calls as (name, values...). The metric is the model's weight, which training moves towards 2."""

    metric = "score"
    metric_label = "score"
    best_name = "score"
    predict_command = "python -m utils.predict"
    panels = ()
    lr_batch_size = 4
    ema_batch_size = 4
    smaller_images = "lower nothing"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.classes, self.numbers = ["a", "b"], NUMBERS
        self.signal_at: int | None = None  # step during which this process gets `signal`
        self.signal = signal.SIGTERM

    def build_data(self, config: CfgNode, process: Process) -> Any:  # noqa: ARG002
        sizes = {"num_train_images": len(self.numbers), "num_val_images": 2}
        return SimpleNamespace(classes=self.classes, example_image=None, **sizes)

    def build_model(self, config: CfgNode, process: Process, num_classes: int | None) -> nn.Module:  # noqa: ARG002
        self.calls.append(("model", num_classes))
        return nn.Linear(1, 1)

    def load_pretrained(self, model: nn.Module, source: str, classes: Any) -> None:
        nn.init.constant_(model.weight, 1.5)  # type: ignore[arg-type]
        self.calls.append(("pretrained", source, classes))

    def test_kernels(self, config: CfgNode, model: nn.Module, dtype: torch.dtype, *args: Any) -> None:  # noqa: ARG002
        self.calls.append(("kernels", dtype))
        if args:
            args[0]()

    def parameter_groups(self, config: CfgNode, model: nn.Module) -> list[dict[str, Any]]:  # noqa: ARG002
        return parameter_groups(model, 0.0)

    def schedule(self, config: CfgNode, derived: Derived) -> ConstantSchedule:
        return ConstantSchedule(config.TRAIN.BASE_LR * derived.lr_scale)

    def batches(self, run: Run, epoch: int, first: int) -> Iterator[Tensor]:
        self.calls.append(("batches", epoch, first))
        return iter(self.numbers.split(run.config.DATA.BATCH_SIZE)[first:])

    def losses(self, config: CfgNode, network: nn.Module, ema: ModelEma | None, derived: Derived) -> ComputeLosses:  # noqa: ARG002
        self.calls.append(("losses",))

        def compute(numbers: Tensor, step: int) -> dict[str, Tensor]:
            if step == self.signal_at:
                os.kill(os.getpid(), self.signal)
            return {"square": (network(numbers) - 2 * numbers).square().mean()}

        return compute

    def evaluate(self, run: Run, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:  # noqa: ARG002
        self.calls += [("evaluate", name, weight_of(models[name])) for name in models]
        return {name: {"score": weight_of(models[name])} for name in models}

    def draw_predictions(self, run: Run, model: nn.Module, title: str) -> Path:
        self.calls.append(("draw", weight_of(model), model.training, title))
        path = run.folder / "predictions.png"
        Image.new("RGB", (2, 2)).save(path)
        return path

    def profile(self, config: CfgNode) -> str:
        return f"a table of {config.MODEL.NAME}"

    def synthetic_batch(self, *_: Any) -> Any:
        raise NotImplementedError

    def inference_call(self, *_: Any) -> Callable[[], object]:
        raise NotImplementedError

    def image_size(self, config: CfgNode, *, training: bool) -> tuple[int, int]:  # noqa: ARG002
        return 8, 8


def weight_of(model: nn.Module) -> float:
    return next(model.parameters()).item()


class FakeRun:
    """A command that runs the fake task; its arguments are keys with "__" for "."."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / "mlla_digits" / "default"
        self.task = FakeTask()

    def __call__(self, **settings: Any) -> int:
        """Return the exit code."""
        self.task.calls.clear()
        config = make_config(OUTPUT=str(self.output), **settings)
        return exit_code(lambda _: run_task(self.task, config, run_throughput=self.run_throughput), [])

    def run_throughput(self, task: Task, config: CfgNode, process: Process) -> None:
        assert task is self.task
        self.task.calls.append(("throughput", config.MODEL.NAME, process.rank))

    def calls(self, name: str) -> list[list[Any]]:
        return [values for call, *values in self.task.calls if call == name]

    @property
    def log(self) -> str:
        return (self.folder / "log_rank0.txt").read_text()


def make_config(**settings: Any) -> CfgNode:
    flags = {"DATA.BATCH_SIZE": 2, "TRAIN.EPOCHS": 2, "TRAIN.WARMUP_EPOCHS": 0, "TRAIN.BASE_LR": 0.02}
    flags |= {"EMA.DECAY": 0.9, "TRAIN.COMPILE": "off", "TEST.COMPILE": "off"}
    return load_config("cfgs/digits.yaml", flags=flags | {key.replace("__", "."): v for key, v in settings.items()})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    monkeypatch.setattr("utils.logs.recorder.plot_curves", lambda *_: None)
    monkeypatch.setattr("utils.training.training_run.record_environment", lambda *_, **__: None)
    return FakeRun(tmp_path)


def test_training_learns_and_saves_state_and_metadata(run: FakeRun) -> None:
    assert run() == 0
    assert run.calls("model") == [[2]]
    assert run.task.calls.index(("batches", 0, 0)) < run.task.calls.index(("losses",))  # workers load during set-up
    assert run.calls("batches") == [[0, 0], [1, 0]]
    assert [name for name, _ in run.calls("evaluate")] == ["model", "EMA"] * 2
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert [record["lr"] for record in records] == [0.01, 0.01]  # BASE_LR is for twice the global batch size
    content = load_checkpoint(run.folder / "ckpt_epoch_1.pth")
    assert content["config"] == (run.folder / "config.yaml").read_text()
    assert (content["classes"], content["images_per_step"], content["epoch"]) == (["a", "b"], 2, 1)
    last_scores = dict(run.calls("evaluate")[2:])
    assert (content["max_accuracy"], content["max_accuracy_e"]) == (last_scores["model"], last_scores["EMA"])
    assert {"max_score.pth", "max_ema_score.pth"} <= {path.name for path in run.folder.iterdir()}
    assert content["scores"] == last_scores
    assert last_scores["model"] > last_scores["EMA"]
    weights = "model weights (score of the model {model:.2f}, of the EMA {EMA:.2f})".format(**last_scores)
    assert run.calls("draw") == [[last_scores["model"], False, f"mlla_digits: {weights}"]]  # the better one
    assert f"predictions are drawn by the {weights}" in run.log
    assert f"the better weights are in {run.folder}/max_score.pth; to use them:" in run.log


def test_a_complete_run_is_left_as_it_is(run: FakeRun) -> None:
    assert run() == 0
    checkpoints = {path: path.read_bytes() for path in run.folder.glob("*.pth")}
    assert run() == 0
    assert "this run is complete" in run.log
    assert run.calls("batches") == run.calls("evaluate") == run.calls("draw") == []
    assert {path: path.read_bytes() for path in run.folder.glob("*.pth")} == checkpoints
    (run.folder / "predictions.png").unlink()
    assert run() == 0
    assert len(run.calls("draw")) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_run_resumes_at_the_next_micro_batch(
    run: FakeRun, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    whole = FakeRun(tmp_path / "whole")
    assert whole() == 0
    run.task.signal_at, run.task.signal = 5, number
    assert run() == code
    assert run.calls("draw") == []
    assert [path.name for path in run.folder.glob("ckpt_epoch_1*")] == ["ckpt_epoch_1_step_2.pth"]
    run.task.signal_at = None
    assert run() == 0
    assert run.calls("batches") == [[1, 2]]
    assert run.calls("evaluate") == whole.calls("evaluate")[2:]
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


@pytest.mark.usefixtures("run")
def test_what_set_up_draws_does_not_change_the_random_numbers_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*_: Any) -> str:
        random.random(), np.random.random(), torch.rand(())
        return ""

    states = []
    for name, set_up in (("plain", lambda *_: ""), ("drawn", draw)):
        monkeypatch.setattr("utils.training.training_run.memory_warning", set_up)
        other = FakeRun(tmp_path / name)
        other.task.signal_at = 5
        assert other() == 0
        other.task.signal_at = None
        assert other() == 0
        states.append(load_checkpoint(other.folder / "ckpt_epoch_1.pth")["ranks"])
    assert is_same(*states)


def make_official(path: Path, epochs: int) -> None:
    """Turn a checkpoint into one of the official code, which counts complete epochs."""
    content = load_checkpoint(path)
    names = ("model", "state_dict_ema", "optimizer", "max_accuracy", "max_accuracy_e")
    content = {name: content[name] for name in names} | {"lr_scheduler": {}, "epoch": epochs, "config": CfgNode()}
    path.unlink()
    torch.save(content, path.with_name(f"ckpt_epoch_{epochs}.pth"))


def steps_taken(folder: Path, name: str) -> set[float]:
    return {entry["step"].item() for entry in load_checkpoint(folder / name)["optimizer"]["state"].values()}


def test_an_official_file_resumes_at_the_epoch_after_its_last(run: FakeRun, tmp_path: Path) -> None:
    first = FakeRun(tmp_path / "first")
    assert first() == 0
    make_official(first.folder / "ckpt_epoch_1.pth", 2)
    assert run(MODEL__RESUME=str(first.folder / "ckpt_epoch_2.pth"), TRAIN__EPOCHS=3) == 0
    assert run.calls("batches") == [[2, 0]]
    assert steps_taken(run.folder, "ckpt_epoch_2.pth") == {12}  # four per epoch


@pytest.mark.parametrize("is_named", [False, True])
def test_a_run_goes_on_in_an_official_output_folder(run: FakeRun, is_named: bool) -> None:
    """Its ckpt_epoch_2.pth holds what is ckpt_epoch_1.pth here; a stop within the next epoch must find its own file."""
    assert run() == 0
    (run.folder / "latest.json").unlink()
    for epochs in (2, 1):
        make_official(run.folder / f"ckpt_epoch_{epochs - 1}.pth", epochs)
    official = {path.name: path.read_bytes() for path in run.folder.glob("ckpt_*.pth")}
    assert set(official) == {"ckpt_epoch_1.pth", "ckpt_epoch_2.pth"}
    run.task.signal_at = 9
    named = {"MODEL__RESUME": str(run.folder / "ckpt_epoch_2.pth")} if is_named else {}
    assert run(TRAIN__EPOCHS=4, **named) == 0
    assert run.calls("batches") == [[2, 0]]
    assert {path.name for path in run.folder.glob("ckpt_*.pth")} == {"ckpt_epoch_1.pth", "ckpt_epoch_2_step_2.pth"}
    run.task.signal_at = None
    assert run(TRAIN__EPOCHS=4) == 0
    assert run.calls("batches") == [[2, 2], [3, 0]]
    assert steps_taken(run.folder, "ckpt_epoch_3.pth") == {16}
    assert {path.name: path.read_bytes() for path in (run.folder / "replaced_1").glob("ckpt_*.pth")} == official
    assert not (run.folder / "replaced_2").exists()


def test_training_starts_from_pretrained_weights_and_from_start_epoch(run: FakeRun) -> None:
    rates = {f"TRAIN__{name}": 1e-9 for name in ("BASE_LR", "WARMUP_LR", "MIN_LR")}
    assert run(MODEL__PRETRAINED="w.pth", TRAIN__START_EPOCH=1, **rates) == 0
    assert run.calls("pretrained") == [["w.pth", ["a", "b"]]]
    assert run.calls("batches") == [[1, 0]]
    assert [score for _, score in run.calls("evaluate")] == pytest.approx([1.5, 1.5])  # the EMA starts there, too


def test_a_run_is_not_continued_from_other_weights_nor_on_other_data(
    run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    def config_file() -> str:
        return (run.folder / "config.yaml").read_text()

    assert run(MODEL__PRETRAINED="w.pth", DATA__DATA_PATH="data/a") == 0
    before = {path: path.read_bytes() for path in run.folder.glob("*.pth")}
    longer = {"TRAIN__EPOCHS": 3, "DATA__DATA_PATH": "data/a"}
    refused = [
        (run, {**longer, "MODEL__PRETRAINED": "other.pth"}, "MODEL.PRETRAINED 'w.pth', now 'other.pth'"),
        (run, {"MODEL__PRETRAINED": "other.pth"}, "now 'other.pth'"),  # also when the run is complete
    ]
    for command, settings, message in refused:
        assert command(**settings) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert f"name another --tag; to continue that run all the same, --resume {run.folder}/ckpt_epoch_1.pth" in error
    run.task.classes = ["a", "x"]
    assert run(**longer, MODEL__PRETRAINED="w.pth") == 2
    assert "on other classes, 2 (a, b), where the data has 2 (a, x)" in capsys.readouterr().err
    run.task.classes, run.task.numbers = ["a", "b"], NUMBERS[:6]
    assert run(**{**longer, "DATA__DATA_PATH": "data/b"}) == 2
    assert "on other data, DATA.DATA_PATH 'data/a', now 'data/b'" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.folder.glob("*.pth")} == before
    run.task.numbers = NUMBERS
    assert run(**{**longer, "DATA__DATA_PATH": "data/b"}) == 0  # it moved
    assert "the data moved, DATA.DATA_PATH 'data/a', now 'data/b'" in run.log
    assert run.calls("pretrained") == []
    assert "PRETRAINED: w.pth" in config_file()  # where the run did start from
    assert run(MODEL__PRETRAINED=str(Path("w.pth").resolve()), DATA__DATA_PATH="data/b", TRAIN__EPOCHS=4) == 0
    assert run.calls("pretrained") == []
    assert "PRETRAINED: w.pth" in config_file()


def test_pretrained_weights_are_not_recorded_where_a_file_is_resumed(run: FakeRun, tmp_path: Path) -> None:
    assert run(TAG="first") == 0
    file = tmp_path / "mlla_digits" / "first" / "ckpt_epoch_1.pth"
    assert run(MODEL__RESUME=str(file), MODEL__PRETRAINED="w.pth", TRAIN__EPOCHS=3) == 0
    assert run.calls("pretrained") == []
    assert "PRETRAINED: ''" in (run.folder / "config.yaml").read_text()
    assert "PRETRAINED: ''" in load_checkpoint(run.folder / "ckpt_epoch_2.pth")["config"]


def test_evaluation_loads_model_and_ema_one_after_the_other(run: FakeRun) -> None:
    assert run() == 0
    expected, predictions = run.calls("evaluate")[2:], run.folder / "predictions.png"
    assert expected[0][1] != expected[1][1]
    predictions.unlink()
    assert run(EVAL_MODE=True, MODEL__RESUME=str(run.folder / "ckpt_epoch_1.pth")) == 0
    assert run.calls("evaluate") == expected
    assert run.calls("batches") == []
    (drawn,) = run.calls("draw")
    assert drawn[:2] == [max(score for _, score in expected), False]
    assert "model weights (score of the model" in drawn[2]
    assert predictions.exists()


@pytest.mark.parametrize(("ema", "name"), [(True, "EMA"), (False, "model")])
def test_evaluation_of_the_weights_that_are_asked_for(run: FakeRun, ema: bool, name: str) -> None:
    assert run() == 0
    scores = dict(run.calls("evaluate")[2:])
    file = run.folder / "ckpt_epoch_1.pth"
    assert run(EVAL_MODE=True, EVAL_EMA=ema, MODEL__RESUME=str(file)) == 0
    assert run.calls("evaluate") == [[name, scores[name]]]
    assert run.calls("draw")[0][2] == f"mlla_digits: {name} weights (score {scores[name]:.2f})"


def test_evaluation_of_weights_that_the_file_lacks(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run.output / "weights.pth"
    torch.save(nn.Linear(1, 1).state_dict(), weights)
    assert run(EVAL_MODE=True, EVAL_EMA=True, MODEL__RESUME=str(weights)) == 2
    assert f"{weights}: has no EMA weights; leave out --ema" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"AMP": True}, torch.float32),
        ({"AMP": True, "AMP_DTYPE": "bfloat16"}, torch.bfloat16),
        ({"AMP_DTYPE": "bfloat16"}, torch.float32),
    ],
)
def test_evaluation_is_in_float32_unless_asked(run: FakeRun, settings: dict[str, Any], dtype: torch.dtype) -> None:
    weights = run.output / "weights.pth"
    torch.save(nn.Linear(1, 1).state_dict(), weights)
    assert run(EVAL_MODE=True, MODEL__RESUME=str(weights), **settings) == 0
    assert run.calls("kernels") == [[dtype]]
    assert f"Evaluation in {str(dtype).removeprefix('torch.')}\n" in run.log
    is_ignored = settings == {"AMP": True}
    assert ("--eval does not use --amp; add --opts AMP_DTYPE bfloat16" in run.log) == is_ignored


def test_evaluation_needs_weights(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(EVAL_MODE=True) == 2
    assert "MODEL.RESUME" in capsys.readouterr().err
    assert run.task.calls == []


def test_the_mode_decides_on_the_work(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PROFILE_MODE=True) == 0
    assert capsys.readouterr().out == "a table of mlla_digits\n"
    assert run(THROUGHPUT_MODE=True) == 0
    assert run.task.calls == [("throughput", "mlla_digits", 0)]
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("decay", "warmup", "is_slow"), [(0.99, "off", True), (0.01, "off", False), (0.99, "auto", False)]
)
def test_an_ema_that_is_too_slow_for_the_run_is_reported(
    run: FakeRun, decay: float, warmup: str, is_slow: bool
) -> None:
    assert run(EMA__DECAY=decay, EMA__WARMUP=warmup) == 0
    assert ("set EMA.WARMUP auto" in run.log) == is_slow
    assert ("with warm-up" in run.log) == (warmup == "auto")


def test_processes_start_with_the_same_weights_and_other_random_numbers() -> None:
    task, config, drawn = FakeTask(), make_config(SEED=3, AMP=True, AMP_DTYPE="bfloat16"), []
    models = []
    for rank in range(2):
        models.append(prepare_model(task, config, Process(rank, 2, CPU), None))
        drawn.append(torch.rand(()))
    assert weight_of(models[0]) == weight_of(models[1])
    assert drawn[0] != drawn[1]
    assert task.calls == [("model", None), ("kernels", torch.bfloat16)] * 2


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_run_whose_folder_another_run_may_have_ends_without_writing(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], is_moved: bool
) -> None:
    evaluate = run.task.evaluate

    def lose_folder(*args: Any) -> dict[str, float]:
        if is_moved:
            run.folder.rename(tmp_path / "moved")
        else:
            (run.folder / "run.lock").unlink()
        monkeypatch.setattr(run.task, "evaluate", evaluate)
        return evaluate(*args)

    monkeypatch.setattr(run.task, "evaluate", lose_folder)
    assert run(EMA__ENABLED=False, TRAIN__SAVE_IN_BACKGROUND=False) == 2
    folder = tmp_path / "moved" if is_moved else run.folder
    assert "run.lock: was deleted or moved away while this run held it" in capfd.readouterr().out
    assert [path.name for path in folder.glob("*.pth")] == ["ckpt_epoch_0_step_4.pth"]
    assert not (folder / "metrics.jsonl").read_text()
    assert not run.folder.exists() or not is_moved


def test_a_turned_bit_in_the_newest_checkpoint_costs_one_epoch(run: FakeRun, tmp_path: Path) -> None:
    whole = FakeRun(tmp_path / "whole")
    assert whole() == 0
    run.task.signal_at = 7  # the last step
    assert run() == 0
    newest = run.folder / "ckpt_epoch_1_step_4.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run.task.signal_at = None
    assert run() == 0
    assert run.calls("batches") == [[1, 0]]
    assert f"skipped a checkpoint: {newest}: is damaged" in run.log
    assert (run.folder / "replaced_1" / newest.name).read_bytes() == content
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_another_number_of_images_is_refused_within_an_epoch(run: FakeRun, capfd: pytest.CaptureFixture[str]) -> None:
    run.task.signal_at = 5
    assert run() == 0
    run.task.signal_at = None
    run.task.numbers = NUMBERS[:6]
    assert run() == 2
    assert "was saved within an epoch with number of training images 8, now it is 6" in capfd.readouterr().err
    assert run.calls("batches") == []


def test_the_log_says_where_the_start_went(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()
    clock = StartClock({"imports": 7.0}, lambda: next(seconds))
    monkeypatch.setattr("utils.training.run.StartClock", lambda _: clock)
    assert run(TRAIN__EPOCHS=1) == 0
    expected = (
        "First step after 18.0 s: imports 7.0, GPU and process group 1.0, data 1.0, model 1.0, loader workers 1.0, "
        "kernels 2.0, training step 1.0, compiling 1.0, evaluation's graph 1.0, first batch 1.0, first step 1.0"
    )
    assert expected in run.log


def test_an_error_in_the_step_is_not_taken_for_one_of_the_kernels_test(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> ComputeLosses:
        run.task.calls.append(("losses",))
        raise ValueError("no loss for these targets")

    def go_on(*args: Any) -> None:
        with contextlib.suppress(Exception):
            args[3]()

    monkeypatch.setattr(run.task, "losses", refuse)
    monkeypatch.setattr(run.task, "test_kernels", go_on)
    assert run() == 1
    assert run.calls("losses") == [[]]
    assert "ValueError: no loss for these targets" in run.log


@pytest.mark.parametrize(("num_processes", "order"), [(1, ["test", "build"]), (2, ["build", "test"])])
def test_several_processes_build_the_step_before_kernels_are_tested(num_processes: int, order: list[str]) -> None:
    """Building measures how fast they exchange gradients."""
    calls: list[str] = []
    step = SimpleNamespace()

    def test_kernels(*args: Any) -> None:
        calls.append("test")
        args[3]()

    training: Any = SimpleNamespace(
        run=SimpleNamespace(
            config=make_config(),
            model=None,
            process=Process(0, num_processes, torch.device("cpu")),
            precision=SimpleNamespace(dtype=torch.float32),
            start=SimpleNamespace(end=lambda _: None),
        ),
        task=SimpleNamespace(test_kernels=test_kernels),
        build_step=lambda: (calls.append("build"), step)[1],
        compile_ahead=lambda _: None,
    )
    assert Training.prepare_step(training) is step
    assert calls == order

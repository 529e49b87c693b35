"""The training loop around a fake step that only records how it was called."""

import itertools
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from utils.checkpoint import files
from utils.checkpoint.files import Progress
from utils.checkpoint.weights_file import load_checkpoint
from utils.distributed.process import Process
from utils.distributed.stop_signal import Cause
from utils.logs.logger import StepTimer, logger
from utils.logs.output_dir import OutputError
from utils.logs.recorder import RunRecorder
from utils.training.amp import make_precision
from utils.training.ema import ModelEma
from utils.training.optimizer import make_optimizer, parameter_groups
from utils.training.train_state import TrainState
from utils.training.train_step import NonFiniteLossError, StepResult, TrainStep
from utils.training.trainer import SaveError, Trainer, TrainerConfig

CPU = torch.device("cpu")
STEPS = 4  # per epoch


class FakeStep(TrainStep):
    """Records its calls. The loss of step n is 2n, n for each of two terms; its gradient norm is n.

    Args:
        model: gets a new weight at each step, so that checkpoints differ.
        before: called with the number of each step.
        bad_step: reported as not finite once it is done.
    """

    def __init__(self, model: nn.Sequential, before: Callable[[int], None], bad_step: int | None) -> None:
        self.model, self.before, self.bad_step = model, before, bad_step
        self.overflow_at: int | None = None  # step whose gradient norm is infinite, as float16's may be
        self.calls: list[tuple[int, float, list[Any]]] = []

    def __call__(self, micro_batches: Sequence[Any], *, step: int, learning_rate: float) -> StepResult:
        assert self.model.training
        self.before(step)
        self.calls.append((step, learning_rate, list(micro_batches)))
        nn.init.constant_(next(self.model.parameters()), step)
        value = torch.tensor(float(step))
        norm = value if step != self.overflow_at else torch.tensor(math.inf)
        return StepResult(2 * value, norm, {"first": value, "second": value})

    def prepare(self, step: int, learning_rate: float) -> None:
        self.prepared = step, learning_rate

    def check_finite(self, step: int) -> int | None:
        return self.bad_step if self.bad_step is not None and self.bad_step <= step else None


class FakeRun:
    """A trainer with a fake step, whose parts are recorded.

    Args:
        folder: the output folder, which may have a checkpoint of an earlier FakeRun.
        scores, ema_scores: metric by epoch; the EMA is off without `ema_scores`.
        before_step: called with the run and the number of each step.
        bad_step: step whose loss is not finite.
        draw: replaces the method that draws predictions.
        settings: of TrainerConfig.
    """

    def __init__(
        self,
        folder: Path,
        *,
        scores: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 5.0),
        ema_scores: Sequence[float] = (),
        before_step: Callable[["FakeRun", int], None] = lambda *_: None,
        bad_step: int | None = None,
        draw: Callable[[nn.Module, str], Path] | None = None,
        **settings: Any,
    ) -> None:
        model = nn.Sequential(nn.Linear(1, 1))
        precision = make_precision(CPU, amp=False, dtype="auto")
        self.state = TrainState(
            model,
            ModelEma(model, 0.5) if ema_scores else None,
            make_optimizer("sgd", parameter_groups(model, 0.0)),
            precision.scaler,
            Process(0, 1, CPU),
            global_batch_size=8,
        )
        folder.mkdir(exist_ok=True)
        self.state.resume(folder, explicit="", auto=True)
        self.folder = folder
        self.scores = {"model": scores, "EMA": ema_scores}
        self.step = FakeStep(model, partial(before_step, self), bad_step)
        self.asked_batches: list[tuple[int, int]] = []
        self.evaluated: list[str] = []
        self.expected: list[tuple[int, int]] = []  # epochs, and the number of evaluations before they were expected
        config = {"total_epochs": 2, "steps_per_epoch": STEPS, "lr_at": lambda step: step / 100, "metric": "acc1"}
        config |= {"panels": (), "save_in_background": False}
        self.trainer = Trainer(
            TrainerConfig(**{**config, **settings}),
            self.state,
            self.step,
            folder=folder,
            batches=self.batches,
            evaluate=self.evaluate,
            metadata={"classes": ["a", "b"]},
            draw_predictions=draw,
            expect_epoch=lambda epoch: self.expected.append((epoch, len(self.evaluated))),
        )
        self.saved: list[list[str]] = []
        self.saved_before_evaluation: list[list[str]] = []
        write = self.trainer.writer.write

        def record_names(progress: Progress, names: Sequence[str], content: dict[str, Any]) -> None:
            (self.saved_before_evaluation if progress.steps == STEPS else self.saved).append(list(names))
            write(progress, names, content)

        self.trainer.writer.write = record_names  # type: ignore[method-assign]

    def batches(self, epoch: int, first: int) -> Iterator[str]:
        self.asked_batches.append((epoch, first))
        return (f"{epoch}:{number}" for number in itertools.count(first))

    def evaluate(self, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
        assert models["model"] is self.state.model
        self.evaluated += models
        epoch = self.state.progress.epochs
        return {name: {"acc1": self.scores[name][epoch], "loss": 0.25} for name in models}

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def stop_before(number: int, cause: Cause = Cause.SIGTERM) -> Callable[[FakeRun, int], None]:
    def before(run: FakeRun, step: int) -> None:
        if step == number:
            run.trainer.stop.ask(cause)

    return before


@pytest.fixture(autouse=True)
def _log_is_seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="mlla")


@pytest.fixture(autouse=True)
def curves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of records at each drawing of curves.png, which is not drawn."""
    drawn: list[int] = []
    monkeypatch.setattr("utils.logs.recorder.plot_curves", lambda records, *_: drawn.append(len(records)))
    return drawn


def test_the_next_epoch_is_expected_when_an_evaluation_begins_but_not_after_the_last_one(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", total_epochs=3)
    assert run.trainer.run()
    assert run.expected == [(1, 0), (2, 1)]


def test_steps_run_in_order_with_their_learning_rates(tmp_path: Path, curves: list[int]) -> None:
    run = FakeRun(tmp_path / "run")
    assert run.trainer.run()
    batches = [[f"{epoch}:{index}"] for epoch in range(2) for index in range(STEPS)]
    assert run.step.calls == [(step, step / 100, batch) for step, batch in enumerate(batches)]
    assert run.asked_batches == [(0, 0), (1, 0)]
    assert run.evaluated == ["model", "model"]
    assert curves[-1] == 2  # drawn after the last epoch, however soon


def test_accumulation_takes_that_many_micro_batches_per_step(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", accumulation_steps=3, total_epochs=1)
    assert run.trainer.run()
    expected = [[f"0:{3 * step + i}" for i in range(3)] for step in range(STEPS)]
    assert [micro_batches for *_, micro_batches in run.step.calls] == expected


def test_metrics_are_means_over_the_epoch(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", ema_scores=(7.0, 9.0))
    assert run.trainer.run()
    assert run.evaluated == ["model", "EMA"] * 2
    means = [1.5, 5.5]  # of the steps' numbers
    expected = {"epoch": [0, 1], "step": [4, 8], "lr": [0.03, 0.07], "grad_norm": means}
    expected |= {"train_loss": [3.0, 11.0], "train_first": means, "train_second": means}
    expected |= {"acc1": [1.0, 2.0], "loss": [0.25] * 2, "ema_acc1": [7.0, 9.0], "ema_loss": [0.25] * 2}
    assert [list(record) for record in run.metrics] == [list(expected)] * 2
    assert {key: [record[key] for record in run.metrics] for key in expected} == expected
    speeds = [json.loads(line) for line in (run.folder / "speed.jsonl").read_text().splitlines()]
    keys = "epoch steps train_seconds data_wait_seconds eval_seconds images_per_second memory_mib process_seconds"
    assert [list(speed) for speed in speeds] == [keys.split()] * 2
    assert [speed["steps"] for speed in speeds] == [STEPS, STEPS]
    for speed in speeds:
        assert speed["images_per_second"] == pytest.approx(STEPS * 8 / speed["train_seconds"])
        assert 0 <= speed["data_wait_seconds"] <= speed["train_seconds"]


def test_sums_start_at_zero_in_each_epoch_even_if_nothing_is_saved_between(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", scores=(-1.0, -1.0), save_freq=9, save_steps=3)
    assert run.trainer.run()
    assert run.saved[0] == ["ckpt_epoch_0_step_3.pth"]
    assert [record["train_loss"] for record in run.metrics] == [3.0, 11.0]


def test_gradient_norms_that_overflowed_do_not_count(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", total_epochs=1)
    run.step.overflow_at = 3
    assert run.trainer.run()
    assert run.metrics[0]["grad_norm"] == 1.0  # mean of 0, 1 and 2
    assert run.metrics[0]["train_loss"] == 3.0


@pytest.mark.parametrize(("frequency", "expected"), [(2, [2, 4]), (3, [3, 4]), (10, [4]), (1, [1, 2, 3, 4])])
def test_progress_is_logged_every_print_freq_steps_and_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, frequency: int, expected: list[int]
) -> None:
    """And on a CPU after the second step of a start."""
    assert FakeRun(tmp_path / "run", print_freq=frequency).trainer.run()
    lines = [record.args for record in caplog.records if "grad_norm" in record.getMessage()]
    assert [args[:3] for args in lines if isinstance(args, tuple)] == [
        (f"Train: [{epoch}/2]", step, STEPS) for epoch in (0, 1) for step in ([*{2, *expected}], expected)[epoch]
    ]


def test_rate_and_eta_leave_out_start_up_and_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first step takes a minute, the others 2 s, evaluation ten minutes; a step has 8 images."""
    now = 0.0

    def before(_: FakeRun, step: int) -> None:
        nonlocal now
        now += 2 if step else 60

    def evaluate(*_: Any) -> dict[str, dict[str, float]]:
        nonlocal now
        now += 600
        return {"model": {"acc1": 1.0}}

    run = FakeRun(tmp_path / "run", print_freq=2, before_step=before)
    run.trainer.timer = StepTimer(num_untimed=1, clock=lambda: now)
    run.trainer.evaluate = evaluate
    assert run.trainer.run()
    endings = [message.split("  ")[-2:] for message in caplog.messages if "img/s" in message]
    assert endings == [["4 img/s", f"eta 00:{seconds:02}"] for seconds in (12, 8, 4, 0)]


def test_waiting_for_data_is_a_warning_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = FakeRun(tmp_path / "run", scores=(1.0, 1.0), total_epochs=20)
    trainer = run.trainer
    trainer.loading_advice = lambda: "use more workers"
    trainer.warn_of_waiting(5.0, 100.0)  # a share that is not worth a warning
    trainer.warn_of_waiting(0.5, 1.0)  # not worth it in 20 epochs
    run.state.progress = Progress(epochs=19)
    trainer.warn_of_waiting(9.0, 10.0)  # nor in the last one
    assert "use more workers" not in caplog.text
    run.state.progress = Progress(epochs=0)
    for _ in range(2):
        trainer.warn_of_waiting(0.6, 1.0)
    assert caplog.text.count("waited 60% of the time: use more workers") == 1


def test_waiting_for_data_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path / "run", scores=(1.0,), total_epochs=1)
    batches, waits = run.trainer.batches, []
    monkeypatch.setattr(run.trainer, "warn_of_waiting", lambda wait, train: waits.append(0 < wait <= train))
    run.trainer.batches = lambda *args: (time.sleep(0.001) or batch for batch in batches(*args))
    assert run.trainer.run()
    assert waits == [True]


def test_each_epoch_leaves_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of equal scores the later is the best; a run that resumes knows the epochs of its best scores."""
    scores = {"scores": (10.0, 30.0, 30.0, 20.0), "ema_scores": (5.0, 40.0, 2.0, 1.0), "metric_label": "top-1"}
    assert FakeRun(tmp_path / "run", total_epochs=3, **scores).trainer.run()
    run = FakeRun(tmp_path / "run", total_epochs=4, **scores)
    assert run.trainer.run()
    lines = [record.getMessage() for record in caplog.records if getattr(record, "is_epoch", False)]
    assert lines == [
        "epoch 1/3: loss 3.000, top-1 10.00, EMA 5.00, 00:00, best 10.00 (epoch 1)",
        "epoch 2/3: loss 11.000, top-1 30.00, EMA 40.00, 00:00, best 40.00 (epoch 2)",
        "epoch 3/3: loss 19.000, top-1 30.00, EMA 2.00, 00:00, best 40.00 (epoch 2)",
        "epoch 4/4: loss 27.000, top-1 20.00, EMA 1.00, 00:00, best 40.00 (epoch 2)",
    ]
    assert run.state.best_epochs == {"model": 3, "EMA": 2}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({}, [["ckpt_epoch_0.pth"], ["ckpt_epoch_1.pth"], ["ckpt_epoch_2.pth"]], id="each epoch"),
        pytest.param({"save_freq": 2}, [["ckpt_epoch_1.pth"], ["ckpt_epoch_2.pth"]], id="second and last"),
        pytest.param({"save_freq": 9}, [["ckpt_epoch_2.pth"]], id="only last"),
        pytest.param(
            {"save_freq": 9, "save_steps": 3},  # steps 3, 6, 9 and 12 of the run; the last ends an epoch
            [[f"ckpt_epoch_{name}.pth"] for name in ("0_step_3", "1_step_2", "2_step_1", "2")],
            id="steps",
        ),
    ],
)
def test_checkpoints_of_epochs_and_steps(tmp_path: Path, settings: dict[str, int], expected: list[list[str]]) -> None:
    run = FakeRun(tmp_path / "run", scores=(-1.0,) * 3, total_epochs=3, **settings)  # none is the best
    assert run.trainer.run()
    assert run.saved == expected


@pytest.mark.parametrize(("save_freq", "kept"), [(1, [7, 8, 9]), (2, [1, 3, 5, 7, 9]), (3, [2, 5, 8, 9])])
def test_only_checkpoints_of_every_epoch_are_deleted(tmp_path: Path, save_freq: int, kept: list[int]) -> None:
    run = FakeRun(tmp_path / "run", scores=(-1.0,) * 10, total_epochs=10, save_freq=save_freq, save_steps=3)
    assert run.trainer.run()
    assert {path.name for path in run.folder.glob("*.pth")} == {f"ckpt_epoch_{epoch}.pth" for epoch in kept}


def test_the_second_ctrl_c_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    trainer = FakeRun(tmp_path / "run").trainer
    trainer.interrupt(1)
    assert not codes
    assert "saves; again: ends at once" in caplog.text
    trainer.interrupt(2)
    assert codes == [130]


def test_the_best_of_model_and_ema_are_kept_by_the_metric(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = FakeRun(
        tmp_path / "run",
        scores=(10.0, 9.0, 10.0, 30.0),
        ema_scores=(5.0, 6.0, 2.0, 1.0),
        total_epochs=4,
        save_freq=9,
        best_name="miou",
        best_label="mIoU",
    )
    assert run.trainer.run()
    bests = [message for message in caplog.messages if message.startswith("Max ")]
    assert bests[:2] == ["Max mIoU: 10.000%", "Max EMA mIoU: 5.000%"]
    assert bests[-2:] == ["Max mIoU: 30.000%", "Max EMA mIoU: 6.000%"]
    both = ["max_miou.pth", "max_ema_miou.pth"]
    assert run.saved == [both, both[1:], both[:1], ["ckpt_epoch_3.pth", "max_miou.pth"]]  # of equals the later
    assert (run.state.best, run.state.best_ema) == (30.0, 6.0)
    assert load_checkpoint(run.folder / "max_ema_miou.pth")["epoch"] == 1
    last = load_checkpoint(run.folder / "max_miou.pth")
    assert (last["epoch"], last["max_accuracy"], last["max_accuracy_e"], last["classes"]) == (3, 30.0, 6.0, ["a", "b"])
    assert last["model"]["0.weight"].item() == 4 * STEPS - 1  # of the last step
    assert (run.folder / "max_miou.pth").samefile(run.folder / "ckpt_epoch_3.pth")


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_stopped_run_saves_within_the_epoch_and_resumes_there(tmp_path: Path, number: int) -> None:
    """The metrics are, to the last bit, those of an uninterrupted run. Step 3 is the last of its epoch."""
    whole = FakeRun(tmp_path / "whole", accumulation_steps=2)
    assert whole.trainer.run()
    run = FakeRun(tmp_path / "run", accumulation_steps=2, before_step=stop_before(number))
    assert not run.trainer.run()
    epoch, steps = divmod(number + 1, STEPS) if number != 3 else (0, 4)
    assert run.state.progress == (epoch, steps)
    saved = run.saved_before_evaluation if number == 3 else run.saved
    assert saved[-1] == [f"ckpt_epoch_{epoch}_step_{steps}.pth"]
    assert len(run.metrics) == len(run.evaluated) == epoch

    resumed = FakeRun(tmp_path / "run", accumulation_steps=2)
    assert resumed.trainer.run()
    assert resumed.asked_batches[0] == ((epoch, 2 * steps) if number != 3 else (1, 0))
    assert run.step.calls + resumed.step.calls == whole.step.calls
    assert (resumed.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    speed = json.loads((resumed.folder / "speed.jsonl").read_text().splitlines()[epoch])
    assert speed["steps"] == STEPS - steps  # of this process


def test_a_run_that_is_stopped_at_once_saves_nothing(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.trainer.stop.ask(Cause.SIGUSR1)
    assert not run.trainer.run()
    assert run.saved == run.step.calls == []


@pytest.mark.parametrize("cause", [Cause.SIGTERM, Cause.NONE])
def test_the_process_knows_that_sigterm_came_before_a_failure(tmp_path: Path, cause: Cause) -> None:
    def fail(run: FakeRun, _: int) -> None:
        run.trainer.stop.ask(cause)
        raise RuntimeError("Connection closed by peer")

    run = FakeRun(tmp_path / "run", before_step=fail)
    with pytest.raises(RuntimeError, match="closed by peer"):
        run.trainer.run()
    assert run.trainer.process.has_sigterm.is_set() == (cause is Cause.SIGTERM)


def test_a_stop_right_after_a_checkpoint_does_not_save_it_again(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", save_steps=2, before_step=stop_before(1))
    assert not run.trainer.run()
    assert run.saved == [["ckpt_epoch_0_step_2.pth"]]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_that_is_stopped_in_a_long_evaluation_ends_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    codes: list[int] = []
    ended = threading.Event()
    monkeypatch.setattr("utils.distributed.stop_signal.GRACE_SECONDS", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    run = FakeRun(tmp_path / "run")

    def evaluate(*_: Any) -> dict[str, dict[str, float]]:
        if run.state.progress.epochs == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended.wait(20)
        return {"model": {"acc1": 1.0}}

    run.trainer.evaluate = evaluate
    run.trainer.run()
    assert codes == [0]
    line = next(message for message in caplog.messages if "stopped while" in message)
    assert line.startswith("SIGTERM: stopped while compiling or evaluating; ")
    assert line.endswith(f"is ckpt_epoch_{epoch}_step_4.pth; run the same command to resume")


def numbers_in(content: Any) -> Any:
    """Return a checkpoint's content with its tensors as lists, which compare as a whole."""
    if isinstance(content, dict):
        return {key: numbers_in(value) for key, value in content.items()}
    if isinstance(content, list):
        return list(map(numbers_in, content))
    return content.tolist() if isinstance(content, torch.Tensor) else content


@pytest.mark.parametrize("save_freq", [1, 9])
def test_a_failure_in_evaluation_costs_no_epoch(tmp_path: Path, save_freq: int) -> None:
    """The next start begins with the evaluation, and ends with the same files as if nothing had failed."""

    def make_run(name: str) -> FakeRun:
        torch.manual_seed(0)
        return FakeRun(tmp_path / name, ema_scores=(3.0, 2.0, 9.0), save_freq=save_freq, total_epochs=3)

    whole = make_run("whole")
    assert whole.trainer.run()
    run = make_run("run")
    evaluate = run.trainer.evaluate

    def fail(models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
        if run.state.progress.epochs == 1:
            torch.rand(3)  # may have taken random numbers by then
            raise RuntimeError("a broken image")
        return evaluate(models)

    run.trainer.evaluate = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            run.trainer.run()
        assert run.state.progress == (1, STEPS)
    resumed = make_run("run")
    assert resumed.state.progress == (1, STEPS)
    assert resumed.trainer.run()
    assert run.step.calls + resumed.step.calls == whole.step.calls
    assert resumed.step.prepared == (2 * STEPS - 1, 0.07)
    assert resumed.evaluated == ["model", "EMA"] * 2
    names = {path.name for path in whole.folder.glob("*.pth")}
    assert {path.name for path in resumed.folder.glob("*.pth")} == names
    for name in ("metrics.jsonl", "latest.json"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    for name in names:
        assert numbers_in(load_checkpoint(resumed.folder / name)) == numbers_in(load_checkpoint(whole.folder / name))
    speed = [json.loads(line) for line in (resumed.folder / "speed.jsonl").read_text().splitlines()]
    assert [record["steps"] for record in speed] == [STEPS, 0, STEPS]
    assert speed[1]["images_per_second"] is None


def test_a_model_that_diverged_is_never_the_best(tmp_path: Path) -> None:
    """Its accuracy may be a number, of guesses."""
    run = FakeRun(tmp_path / "run", scores=(1.0, 5.0), ema_scores=(1.0, 4.0))
    evaluate = run.trainer.evaluate
    run.trainer.evaluate = lambda models: {
        name: {**scores, "loss": math.nan if run.state.progress.epochs else 0.5}
        for name, scores in evaluate(models).items()
    }
    assert run.trainer.run()
    assert (run.state.best, run.state.best_ema) == (1.0, 1.0)
    assert run.saved[-1] == ["ckpt_epoch_1.pth"]
    assert run.metrics[1]["loss"] is None
    assert run.metrics[1]["acc1"] == 5.0
    assert FakeRun(tmp_path / "run", ema_scores=(1.0,)).state.progress == (2, 0)  # its checkpoint is no damaged one


@pytest.mark.parametrize("bad_step", [STEPS + 2, STEPS + 1])
@pytest.mark.parametrize("has_earlier", [True, False])
def test_a_run_that_resumes_into_divergence_says_from_where_to_resume(
    tmp_path: Path, bad_step: int, has_earlier: bool
) -> None:
    first = FakeRun(tmp_path / "run", before_step=stop_before(STEPS))
    assert not first.trainer.run()  # after one step of the second epoch
    earlier = tmp_path / "run" / "ckpt_epoch_0.pth"
    if not has_earlier:
        earlier.unlink()
    run = FakeRun(tmp_path / "run", bad_step=bad_step, print_freq=1)
    with pytest.raises(NonFiniteLossError) as caught:
        run.trainer.run()
    message = str(caught.value)
    source = f"{tmp_path}/run/ckpt_epoch_1_step_1.pth"
    if bad_step == STEPS + 2:
        assert "Lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD" in message
        assert f"If the run has diverged in {source} already, " in message
    else:
        assert f"the first after resuming from {source}" in message
    none = f"start again with a lower rate and another --tag, since {tmp_path}/run has no earlier checkpoint"
    assert (f"--resume {earlier}" if has_earlier else none) in message


def test_nothing_is_written_once_another_run_may_have_the_folder(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    lost = run.folder / "lost"

    def check() -> None:
        if lost.exists():
            raise OutputError("another run")

    def evaluate(*_: Any) -> dict[str, dict[str, float]]:
        lost.touch()
        return {"model": {"acc1": 1.0}}

    run.trainer.check_folder, run.trainer.evaluate = check, evaluate
    with pytest.raises(OutputError, match="another run"):
        run.trainer.run()
    assert run.metrics == []
    assert [path.name for path in run.folder.glob("*.pth")] == ["ckpt_epoch_0_step_4.pth"]
    with pytest.raises(OutputError, match="another run"):
        run.trainer.save(["ckpt_epoch_0.pth"])
    assert len(list(run.folder.glob("*.pth"))) == 1


class Disk:
    """A disk that is full while `is_full`, and takes `seconds` per checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full, self.seconds = False, 0.0
        self.save = files.save_under_names
        monkeypatch.setattr(files, "save_under_names", self.save_if_possible)

    def save_if_possible(self, *args: Any, **options: Any) -> None:
        time.sleep(self.seconds)
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.save(*args, **options)


def test_a_failed_save_that_is_noticed_later_is_not_repeated(tmp_path: Path) -> None:
    """A checkpoint that is written in the background may fail during a later step."""

    def before(run: FakeRun, step: int) -> None:
        run.trainer.writer.has_failed = step == 2

    run = FakeRun(tmp_path / "run", save_steps=2, stop_on_save_error=True, before_step=before)
    with pytest.raises(SaveError):
        run.trainer.run()
    assert run.saved == [["ckpt_epoch_0_step_2.pth"]]
    assert run.state.progress == (0, 3)


@pytest.mark.parametrize("is_full", [False, True])
def test_a_run_ends_when_its_last_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    disk = Disk(monkeypatch)
    disk.is_full, disk.seconds = is_full, 0.2
    run = FakeRun(tmp_path / "run", total_epochs=1, save_in_background=True)
    with pytest.raises(SaveError) if is_full else nullcontext():
        run.trainer.run()
    assert (run.folder / "ckpt_epoch_0.pth").exists() != is_full


def test_a_failed_save_stops_the_run_if_asked_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch).is_full = True
    run = FakeRun(tmp_path / "run", save_steps=2, stop_on_save_error=True)
    with pytest.raises(SaveError, match=str(run.folder)):
        run.trainer.run()
    assert run.trainer.stop.cause is Cause.SAVING_FAILED
    assert run.saved == [["ckpt_epoch_0_step_2.pth"]]
    assert [step for step, *_ in run.step.calls] == [0, 1]


def test_a_run_continues_after_a_failed_save_and_fails_if_the_last_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)

    def full_after(first: int) -> Callable[[FakeRun, int], None]:
        def before(_: FakeRun, step: int) -> None:
            disk.is_full = step >= first

        return before

    run = FakeRun(tmp_path / "run", before_step=full_after(STEPS))
    with pytest.raises(SaveError, match=str(run.folder)):
        run.trainer.run()
    assert len(run.step.calls) == 2 * STEPS
    assert [path.name for path in run.folder.glob("ckpt_*")] == ["ckpt_epoch_0.pth"]

    def full_in_first_epoch(_: FakeRun, step: int) -> None:
        disk.is_full = step < STEPS

    assert FakeRun(tmp_path / "other", before_step=full_in_first_epoch).trainer.run()


@pytest.mark.parametrize("settings", [{"print_freq": 2}, {"save_steps": 7}, {"before_step": stop_before(6)}])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """It is noticed at the next report, or before saving."""
    run = FakeRun(tmp_path / "run", bad_step=5, **settings)
    with pytest.raises(NonFiniteLossError, match=r"epoch 2, step 2 \(step 6 of the run\), learning rate 5\.000e-02"):
        run.trainer.run()
    assert [name for names in run.saved for name in names if name.startswith("ckpt")] == ["ckpt_epoch_0.pth"]
    assert len(run.metrics) == 1
    assert len(run.step.calls) < 2 * STEPS


@pytest.mark.parametrize(
    ("every", "seconds", "expected"), [(2, 0.0, [1, 3, 4]), (0, 0.0, [4]), (1, 300.0, [4])], ids=["2", "0", "short"]
)
def test_predictions_and_histograms_are_recorded_when_due(
    tmp_path: Path, every: int, seconds: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few of five epochs and after the last; before that not where they take less than five minutes."""
    monkeypatch.setattr("utils.training.trainer.MIN_IMAGE_SECONDS", seconds)
    image = tmp_path / "predictions.png"
    Image.new("RGB", (4, 2)).save(image)
    run = FakeRun(tmp_path / "run", total_epochs=5, image_epochs=every, draw=lambda *_: image)
    assert run.trainer.run()
    events = EventAccumulator(str(run.folder), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Images("predictions")] == expected
    assert [event.step for event in events.Histograms("weights/0")] == expected


def test_the_emas_predictions_are_drawn(tmp_path: Path) -> None:
    drawn = []

    def draw(model: nn.Module, weights: str) -> Path:
        drawn.append((model, model.training, weights))
        raise OSError("not needed")

    run = FakeRun(tmp_path / "ema", ema_scores=(1.0,), total_epochs=1, draw=draw)
    assert run.trainer.run()
    assert run.state.ema is not None
    without = FakeRun(tmp_path / "model", total_epochs=1, draw=draw)
    assert without.trainer.run()
    scores = "EMA weights (score of the model 1.00, of the EMA 1.00)", "model weights (score 1.00)"
    assert drawn == [(run.state.ema.module, False, scores[0]), (without.state.model, False, scores[1])]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, OSError, ValueError, KeyError])
def test_an_image_that_fails_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> Path:
        raise error("no\nmemory")

    details: list[tuple[int, Path | None]] = []
    monkeypatch.setattr(RunRecorder, "add_details", lambda _, epoch, __, image: details.append((epoch, image)))
    assert FakeRun(tmp_path / "run", draw=fail).trainer.run()
    assert details == [(1, None)]
    assert "predictions could not be drawn (" in caplog.text
    assert "memory" in caplog.text


def test_an_interruption_while_drawing_ends_the_run_with_its_records_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(RunRecorder, "close", lambda recorder: closed.append(recorder))

    def interrupt(*_: object) -> Path:
        raise KeyboardInterrupt

    run = FakeRun(tmp_path / "run", draw=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.trainer.run()
    assert closed == [run.trainer.recorder]
    assert (run.folder / "ckpt_epoch_1.pth").exists()

"""The run that detection and segmentation share with classification: measuring speed, compiling, recording."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from downstream.detection import config as detection_config
from downstream.detection import main as detection
from downstream.detection.make_shapes import make_shapes
from downstream.detection.task import Detection
from downstream.segmentation import config as segmentation_config
from downstream.segmentation import main as segmentation
from downstream.segmentation.task import Segmentation
from tests.downstream.detection.test_main import CFG
from tests.downstream.detection.test_main import SMALL as SMALL_DETECTION
from tests.downstream.segmentation.segmentation_worker import CONFIG, make_data
from tests.downstream.segmentation.segmentation_worker import SMALL as SMALL_SEGMENTATION
from tests.helpers import exit_code, note_compiled_modules
from utils.benchmark.measure import Conditions
from utils.distributed.process import Process

TASKS = {"detection": Detection, "segmentation": Segmentation}
SHORT = {
    "detection": {**SMALL_DETECTION, "TRAIN.EPOCHS": "1", "DATA.NUM_WORKERS": "0"},
    "segmentation": {**SMALL_SEGMENTATION, "TRAIN.STEPS": 2, "TRAIN.EVAL_STEPS": 2, "TRAIN.WARMUP_STEPS": 1},
}
LOAD_CONFIG = {"detection": detection_config.load_config, "segmentation": segmentation_config.load_config}
COMMANDS = {"detection": (detection.main, CFG), "segmentation": (segmentation.main, CONFIG)}
Run = Callable[..., tuple[int, str, Path]]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    make_shapes(folder / "detection", {"train": 4, "val": 2}, seed=1)
    return {"detection": folder / "detection", "segmentation": make_data(folder / "segmentation", val=2)}


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    datasets: dict[str, Path],
    tmp_path: Path,
) -> Run:
    """Call a task's command with a small model: (exit code, what it printed, output folder)."""
    monkeypatch.setattr("utils.benchmark.throughput.Conditions", partial(Conditions, rounds=2, round_seconds=0.01))

    def call(task: str, *args: Any, **opts: Any) -> tuple[int, str, Path]:
        main, cfg = COMMANDS[task]
        settings = {**SHORT[task], "DATA.DATA_PATH": datasets[task], "DATA.BATCH_SIZE": 2, **opts}
        pairs = [str(item) for pair in settings.items() for item in pair]
        code = exit_code(main, ["--cfg", cfg, "--output", tmp_path, *args, "--opts", *pairs])
        out, err = capfd.readouterr()
        (folder,) = tmp_path.glob("*/default") if code == 0 else (tmp_path,)
        return code, out + err, folder

    return call


@pytest.mark.parametrize("task", TASKS)
def test_the_workers_of_evaluation_begin_when_those_of_training_run_out_of_work_and_the_reverse(
    datasets: dict[str, Path], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {key: yaml.safe_load(str(value)) for key, value in SHORT[task].items()}
    config = LOAD_CONFIG[task](COMMANDS[task][1], flags={**flags, "DATA.DATA_PATH": str(datasets[task])})
    data = TASKS[task]().build_data(config, Process(0, 1, torch.device("cpu")))
    assert data.train.next_loader is data.val
    assert data.val.next_loader is None
    started: list[tuple[Any, int]] = []
    note = lambda loader, other: started.append((other, loader.batch_sampler.epoch))  # noqa: E731
    monkeypatch.setattr(type(data.train), "start_after", note)
    TASKS[task]().expect_epoch(SimpleNamespace(data=data), 3)  # type: ignore[arg-type]
    assert started == [(data.val, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_speed_of_inference_and_training(run: Run, task: str) -> None:
    code, output, folder = run(task, "--throughput", "--baseline", "timm:test_convnext")
    assert code == 0, output
    assert run(task, "--throughput", "--train")[0] == 0
    rows = [json.loads(line) for line in (folder / "throughput.jsonl").read_text().splitlines()]
    name = folder.parent.name
    assert [(row["model"], row["work"], row["batch"]) for row in rows] == [
        *((model, "inference", batch) for model in (name, "timm:test_convnext") for batch in (2, 1)),
        (name, "training", 2),
    ]
    assert all(row["images_per_second"] > 0 for row in rows)
    sizes = {"detection": {"64x80"}, "segmentation": {64}}
    assert {row["size"] for row in rows} == sizes[task]
    assert (folder / "throughput.png").stat().st_size > 10_000


@pytest.mark.parametrize("task", TASKS)
def test_what_to_measure_needs_throughput(run: Run, task: str) -> None:
    code, output, _ = run(task, "--train")
    assert code == 2
    assert output.startswith("error: BENCHMARK.TRAIN True")
    assert len(output.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_evaluation_compiles_the_backbone_and_gives_the_same_metrics(
    run: Run, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, folder = run(task)
    assert code == 0, output
    trained = json.loads((folder / "metrics.jsonl").read_text())
    environment = [json.loads(line) for line in (folder / "environment.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in environment] == [0]
    compiled = note_compiled_modules(monkeypatch)
    evaluated: list[dict[str, dict[str, float]]] = []
    kind: Any = {"detection": Detection, "segmentation": Segmentation}[task]
    evaluate = kind.evaluate
    monkeypatch.setattr(kind, "evaluate", lambda *args: evaluated.append(evaluate(*args)) or evaluated[-1])
    checkpoint = next(folder.glob("ckpt_*.pth"))
    code, output, _ = run(task, "--eval", "--resume", checkpoint, **{"TEST.COMPILE": "default"})
    assert code == 0, output
    names = {type(module).__name__ for module in compiled}
    assert {"InferenceBlock"} <= names, names
    assert evaluated[0]["model"][kind.metric] == pytest.approx(trained[kind.metric], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("on_the_cpu")  # a GPU adds gradients in any order
def test_a_failure_in_evaluation_costs_no_epoch(
    run: Run, task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same command ends with the same metrics and checkpoint as a run whose evaluation did not fail."""
    code, output, folder = run(task)
    assert code == 0, output
    whole = folder.rename(tmp_path / "whole")
    kind: Any = {"detection": Detection, "segmentation": Segmentation}[task]

    def fail(*_: Any) -> dict[str, float]:
        raise RuntimeError("a broken image")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "evaluate", fail)
        assert run(task)[0] == 1
    (saved,) = folder.glob("*.pth")
    assert "_step_" in saved.name
    monkeypatch.setattr(kind, "batches", fail)  # nothing is trained again
    code, output, _ = run(task)
    assert code == 0, output
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    names = {path.name for path in whole.glob("*.pth")}
    assert {path.name for path in folder.glob("*.pth")} == names
    for name in names:
        contents = [torch.load(path / name, weights_only=True) for path in (whole, folder)]
        for key in ("model", "state_dict_ema", "optimizer", "max_accuracy", "max_accuracy_e", "scores", "epoch"):
            torch.testing.assert_close(*(content[key] for content in contents), rtol=0, atol=0)
        assert str(contents[0]["ranks"]) == str(contents[1]["ranks"])

"""LOG.WANDB, with a fake of the package, and with the package where it is installed."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.tasks import SETTINGS
from tests.faults.tasks import SMALL as SMALL_MODEL
from tests.helpers import THREE_DIGITS, run_python
from utils.logs import wandb_logger
from utils.logs.logger import logger
from utils.logs.wandb_logger import WandbError, WandbLogger

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the optional package wandb")
SMALL = ["--cfg", "cfgs/digits.yaml", "--batch-size", "64", "--opts", *SETTINGS, *SMALL_MODEL, *THREE_DIGITS]
SMALL += ["DATA.NUM_WORKERS", "0"]


class UsageError(Exception):
    pass


class CommError(Exception):
    pass


class FakeWandb:
    """Records its calls; `failures` holds the exceptions to raise, by name of the call."""

    errors = SimpleNamespace(UsageError=UsageError, CommError=CommError)
    offline = False
    url = "https://example.com/run"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.failures: dict[str, list[Exception]] = {}

    def note(self, name: str, value: Any = None) -> None:
        self.calls.append((name, value))
        if self.failures.get(name):
            raise self.failures[name].pop(0)

    def named(self, name: str) -> list[Any]:
        return [value for call, value in self.calls if call == name]

    def init(self, **wanted: Any) -> "FakeWandb":
        self.note("init", wanted)
        return self

    def Settings(self, **values: Any) -> dict[str, Any]:  # noqa: N802, the name is wandb's
        return values

    def Image(self, path: str) -> str:  # noqa: N802
        return f"image {Path(path).name}"

    def define_metric(self, *names: str, **_: str) -> None:
        self.note("define_metric", names)

    def log(self, values: dict[str, Any]) -> None:
        self.note("log", values)

    def finish(self) -> None:
        self.note("finish")

    def teardown(self) -> None:
        self.note("teardown")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(logger, "propagate", True)
    return module


@pytest.mark.slow
def test_the_wandb_run_resumes_with_this_run(
    fake: FakeWandb, tmp_path: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    args = ["--output", tmp_path, *SMALL, "LOG.WANDB", "digits"]
    assert run_main(*args, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")[0] == 0
    code, out, _ = run_main(*args, "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0")
    assert code == 0
    assert "Weights & Biases: https://example.com/run" in out
    first, second = fake.named("init")
    folder = tmp_path / "mlla_digits" / "default"
    assert first["id"] == second["id"] == (folder / "wandb_id.txt").read_text().strip()
    assert (first["project"], first["name"], first["resume"]) == ("digits", "mlla_digits/default", "allow")
    assert (first["config"]["TRAIN.EPOCHS"], second["config"]["TRAIN.EPOCHS"]) == (1, 2)
    metrics = [values for values in fake.named("log") if "acc1" in values]
    assert [values["epoch"] for values in metrics] == [0, 1]
    assert {"train_loss", "ema_acc1", "lr", "images_per_second"} <= set(metrics[0])
    images = [values for values in fake.named("log") if "acc1" not in values]
    assert images == [{"predictions": "image predictions.png", "epoch": epoch} for epoch in (0, 1)]
    assert len(fake.named("finish")) == 2
    assert WandbLogger("p", folder, config={}, continues=False).run is fake  # another run: another id
    assert fake.named("init")[-1]["id"] != first["id"]


def test_failures_do_not_end_training(fake: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake.failures = {"init": [CommError("no\nnetwork")], "log": [BrokenPipeError("gone")]}
    log = WandbLogger("p", tmp_path, config={}, continues=False)
    online, offline = fake.named("init")
    assert "mode" not in online
    assert (offline["mode"], offline["id"]) == ("offline", online["id"])
    assert "cannot be reached (no network); its metrics are kept in" in caplog.text
    for epoch in range(3):
        log.add({"epoch": epoch, "x": None})
    log.close()
    assert fake.named("log") == [{"epoch": 0}]
    assert fake.named("finish") == []
    assert caplog.text.count("Weights & Biases failed and is turned off (gone)") == 1


def test_setup_errors_are_one_line(
    fake: FakeWandb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_main: Callable[..., tuple[int, str, str]],
) -> None:
    fake.failures = {"init": [UsageError("No API key configured.")]}
    with pytest.raises(WandbError, match=r"LOG.WANDB 'p': No API key configured. \(or keep .* WANDB_MODE=offline\)"):
        WandbLogger("p", tmp_path, config={}, continues=False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    code, _, err = run_main("--output", tmp_path, *SMALL, "LOG.WANDB", "p", "TRAIN.EPOCHS", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "error: LOG.WANDB needs the package wandb" in err
    assert "pip install wandb, or set it to ''" in err


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, without a key and without this user's settings."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "user"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(logger, "propagate", True)
    yield
    importlib.import_module("wandb").teardown()  # which reads the environment once


@needs_wandb
@pytest.mark.usefixtures("real")
def test_the_package_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processes logs, and its file has all metrics."""
    args = ["--output", tmp_path, *SMALL, "LOG.WANDB", "digits", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_python(*launcher, "main.py", *map(str, args), forked=True, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "mlla_digits" / "default"
    number = (folder / "wandb_id.txt").read_text().strip()
    (file,) = folder.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb")
    content = file.read_bytes()
    assert all(name in content for name in (b"ema_acc1", b"images_per_second", b"MODEL.NAME", b"predictions"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = WandbLogger("digits", folder, config={"MODEL.NAME": "again"}, continues=True)
    log.add({"epoch": 1, "acc1": 50.0})
    log.close()
    assert not log.has_failed
    assert log.run.id == number


@needs_wandb
@pytest.mark.usefixtures("real")
def test_the_package_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "a").mkdir()
    with pytest.raises(WandbError, match="API key"):
        WandbLogger("p", tmp_path / "a", config={}, continues=True)
    monkeypatch.setattr(wandb_logger, "INIT_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
    with caplog.at_level(logging.WARNING):
        log = WandbLogger("p", tmp_path / "a", config={}, continues=False)
    log.add({"epoch": 0, "x": 1.0})
    log.close()
    assert not log.has_failed
    assert "Weights & Biases cannot be reached" in caplog.text
    assert list(tmp_path.glob("a/wandb/offline-run-*/*.wandb"))

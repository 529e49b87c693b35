"""Fixtures that several test files share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests' tensors are too small to share out

import gc
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import exit_code, make_image_folder

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what imports have made out of garbage collections: one at the end of each run took a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def folder_for_leftovers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Delete temporary files of torchrun and of killed processes when the tests end."""
    tmp_path_factory.getbasetemp()  # outside, so that files of failed tests stay
    with (
        tempfile.TemporaryDirectory(prefix="mlla-tests-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=8, val=5)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the GPU from the commands that a test calls in this process."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def run_main(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return a function that calls main.py's main in this process: (exit code, standard output, standard error).

    It draws no curves, which would take longer than the training.
    """
    import main
    from utils.benchmark.measure import Conditions

    monkeypatch.setattr("utils.logs.recorder.plot_curves", lambda *_: None)
    # No test asserts times: --throughput may be quick.
    monkeypatch.setattr("utils.benchmark.throughput.Conditions", partial(Conditions, rounds=2, round_seconds=0.01))

    def run(*args: Any) -> tuple[int, str, str]:
        code = exit_code(main.main, args)
        out, err = capfd.readouterr()
        return code, out, err

    return run

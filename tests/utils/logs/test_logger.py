import contextlib
import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from utils.logs.logger import LogFile, ProgressBar, StepTimer, errors_logged, logger, start_logging


def closed_stream() -> io.TextIOWrapper:
    with Path(os.devnull).open("w") as stream:
        return stream


def pipe_without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


UNWRITABLE = {
    "none": lambda: None,
    "closed": closed_stream,
    "pipe without reader": pipe_without_reader,
    "ASCII": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    **({"full": lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")} if Path("/dev/full").exists() else {}),
}


@pytest.fixture(params=UNWRITABLE)
def unwritable(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Give a stream that cannot be written, or not with every character; None as where it was closed."""
    stream = UNWRITABLE[request.param]()
    yield stream
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):  # it writes what is left, and closes the stream all the same
            stream.close()


def test_standard_output_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unwritable: Any
) -> None:
    monkeypatch.setattr(sys, "stdout", unwritable)
    start_logging(tmp_path, rank=0)
    for _ in range(3):
        logger.info("a line with é", extra={"is_step": True})
    log = (tmp_path / "log_rank0.txt").read_text(encoding="utf-8")
    assert log.count("ERROR standard output cannot be written (") == 1
    assert log.count("INFO a line with é") == 3


def test_a_terminal_that_is_gone_does_not_end_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, _: str) -> int:
            raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(sys, "stderr", Gone())
    with ProgressBar(0, 1, 3, done=0, is_main=True) as bar:
        for step in range(3):
            bar.bar.last_print_t = 0  # as if a second had passed
            bar.advance()
            bar.report(step + 1, terms={"loss": 1.0}, grad_norm=1.0, lr=1.0, rate=None, step_seconds=None)
    assert bar.bar.fp in (sys.stdout, sys.stderr)  # so tqdm.write clears the bar
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tqdm_lock_is_free).result()  # else the next line of another thread waits forever


def tqdm_lock_is_free() -> bool:
    for lock in tqdm.get_lock().locks:
        if not lock.acquire(False):
            return False
        lock.release()
    return True


def test_errors_of_observers_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(tmp_path, rank=0)
    for error in (OSError(28, "No space left on device"), TypeError("a defect")):
        with errors_logged("no picture"):
            raise error
    said = capsys.readouterr().out
    assert "no picture (No space left on device)" in said
    assert "no picture (TypeError: a defect)" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFile("/dev/full")
    for _ in range(3):
        handler.handle(logger.makeRecord("mlla", 20, "", 0, "a line", (), None))
    err = capsys.readouterr().err
    assert err.count("/dev/full: the log cannot be written ([Errno 28] No space left") == 1
    assert "Traceback" not in err


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_windows_contain_neither_the_first_steps_nor_what_comes_between_windows() -> None:
    clock = Clock()
    timer = StepTimer(num_untimed=2, clock=clock)

    def steps(*seconds: float) -> None:
        for duration in seconds:
            clock.now += duration
            timer.count_step()

    steps(60, 30)  # compiling and recording
    assert timer.end_window() is None
    assert timer.typical() is None
    steps(1, 2, 3)
    assert timer.end_window() == 2
    steps(4)
    assert timer.end_window() == 4
    assert timer.typical() == 3
    clock.now += 500  # evaluation
    timer.start_window()
    assert timer.end_window() is None
    steps(50)  # a pause
    assert timer.end_window() == 50
    assert timer.typical() == 4
    for _ in range(5):
        steps(1)
        timer.end_window()
    assert timer.typical() == 1


@pytest.mark.parametrize(
    ("rate", "step_seconds", "expected"),
    [(None, None, "lr 1.000e-03  ? img/s  eta ?"), (3700.4, 2.5, "lr 1.000e-03  3700 img/s  eta 0:01:15")],
)
def test_report(monkeypatch: pytest.MonkeyPatch, rate: float | None, step_seconds: float | None, expected: str) -> None:
    """After 10 of 20 steps in the second of three epochs, 30 steps remain."""
    said: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *args, **_: said.append(text % args))
    with ProgressBar(1, 3, 20, done=4, is_main=True) as bar:
        bar.report(10, terms={"loss": 1.0}, grad_norm=2.0, lr=1e-3, rate=rate, step_seconds=step_seconds)
    assert said == [f"Train: [1/3][10/20]  loss 1.0000  grad_norm 2.000  {expected}"]

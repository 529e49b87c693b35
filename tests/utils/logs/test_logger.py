import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from utils.logs.logger import (
    DETAIL,
    EPOCH,
    LogFile,
    ProgressBar,
    StepTimer,
    TerminalHandler,
    errors_logged,
    information_as_details,
    logger,
    start_logging,
    with_bar,
)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def write_to(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Let the stream be standard output and error; in the test's body, since pytest sets its own before that."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    return stream


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
        logger.info("a line with é", extra=DETAIL)
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
    [(None, None, "lr 1.000e-03  ? img/s  eta ?"), (3700.4, 2.5, "lr 1.000e-03  3700 img/s  eta 01:25")],
)
def test_report(monkeypatch: pytest.MonkeyPatch, rate: float | None, step_seconds: float | None, expected: str) -> None:
    """After 10 of 20 steps in the second of three epochs, 30 steps remain, and two evaluations of 5 s."""
    said: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *args, **_: said.append(text % args))
    with ProgressBar(1, 3, 20, done=4, is_main=True) as bar:
        speed: dict[str, Any] = {"rate": rate, "step_seconds": step_seconds, "evaluation_seconds": 5.0}
        bar.report(10, terms={"loss": 1.0}, grad_norm=2.0, lr=1e-3, **speed)
    assert said == [f"Train: [1/3][10/20]  loss 1.0000  grad_norm 2.000  {expected}"]


def test_a_bar_of_80_columns_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    write_to(Terminal(), monkeypatch)

    def drawn() -> str:
        return bar.bar.format_meter(**{**bar.bar.format_dict, "ncols": 80})

    with ProgressBar(98, 300, 1251, done=0, is_main=True, text="ETA 99:00:00") as bar:
        assert drawn().endswith("| ETA 99:00:00")  # of the epoch before
        bar.report(1250, terms={"loss": 6.9123}, grad_norm=1.0, lr=1.0, rate=12345.6, step_seconds=0.5)
        assert drawn().startswith("epoch 99/300 0/1251 |")
        assert drawn().endswith("| loss 6.9123  12346 img/s  ETA 34:55:26")
        assert len(drawn()) == 80


def test_other_processes_have_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = write_to(Terminal(), monkeypatch)
    with ProgressBar(0, 1, 2, done=0, is_main=False) as bar:
        bar.advance()
    assert list(with_bar([1, 2], ["EMA"], is_main=False)) == [1, 2]
    assert not terminal.getvalue()


def test_evaluation_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = write_to(Terminal(), monkeypatch)
    assert list(with_bar([1, 2], ["EMA"], is_main=True)) == [1, 2]
    assert "evaluating EMA 0/2 |" in terminal.getvalue()


@pytest.mark.parametrize("on_terminal", [True, False])
def test_details_are_left_to_the_log_file_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_terminal: bool
) -> None:
    stream = write_to(Terminal() if on_terminal else io.StringIO(), monkeypatch)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    start_logging(tmp_path, 0)
    assert any(isinstance(handler, TerminalHandler) for handler in logger.handlers)
    logger.info("a step", extra=DETAIL)
    with information_as_details():
        logger.info("a table")
        logger.warning("a warning")
    logger.info("an epoch", extra=EPOCH)
    logger.info("the end")
    logging.shutdown([lambda: logger.handlers[1]])  # type: ignore[list-item]
    expected = ["a step", "a table", "a warning", "an epoch", "the end"]
    assert [line[24:].split(" ", 1)[1] for line in (tmp_path / "log_rank0.txt").read_text().splitlines()] == expected
    shown = [text for text in expected if text in stream.getvalue()]
    assert shown == (expected[2:] if on_terminal else expected)
    assert stream.getvalue().splitlines()[-2].startswith("an epoch") == on_terminal  # without the clock

from pathlib import Path

import pytest

from utils.logs.logger import LogFile, ProgressBar, StepTimer, logger


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

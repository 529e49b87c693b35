from pathlib import Path

import pytest

from utils.logs.logger import LogFile, RunRecorder, logger, start_logging
from utils.logs.plots import CLASSIFIER_PANELS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFile("/dev/full")
    for _ in range(3):
        handler.handle(logger.makeRecord("mlla", 20, "", 0, "a line", (), None))
    err = capsys.readouterr().err
    assert err.count("/dev/full: the log cannot be written ([Errno 28] No space left") == 1
    assert "Traceback" not in err


def test_figures_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(tmp_path, rank=0)
    recorder = RunRecorder(tmp_path, 0, CLASSIFIER_PANELS)
    recorder.path = tmp_path / "gone" / "metrics.jsonl"
    recorder.add({"epoch": 0}, {"epoch": 0})
    recorder.draw_curves(is_last=True)
    recorder.close()
    assert "gone: figures could not be written (No such file or directory)" in capsys.readouterr().out

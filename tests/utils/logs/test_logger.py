from pathlib import Path

import pytest

from utils.logs.logger import LogFile, logger


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFile("/dev/full")
    for _ in range(3):
        handler.handle(logger.makeRecord("mlla", 20, "", 0, "a line", (), None))
    err = capsys.readouterr().err
    assert err.count("/dev/full: the log cannot be written ([Errno 28] No space left") == 1
    assert "Traceback" not in err

import subprocess
import sys

import pytest

from tests.helpers import ROOT
from utils.logs import process_clock


def test_the_interpreters_start_counts() -> None:
    code = "import time; time.sleep(0.3); from utils.logs.process_clock import process_seconds as s; print(s())"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.25 < float(done.stdout) < 60


def test_without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_clock, "IMPORT_TIME", 100.0)
    monkeypatch.setattr(process_clock.time, "monotonic", lambda: 102.5)
    monkeypatch.delattr(process_clock.time, "CLOCK_BOOTTIME")
    assert process_clock.process_seconds() == 2.5

import os
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.helpers import ROOT
from utils.logs import process_clock
from utils.logs.process_clock import StartClock, import_advice


def test_the_interpreters_start_counts() -> None:
    code = "import time; time.sleep(0.3); from utils.logs.process_clock import process_seconds as s; print(s())"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.25 < float(done.stdout) < 60


def test_without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_clock, "IMPORT_TIME", 100.0)
    monkeypatch.setattr(process_clock.time, "monotonic", lambda: 102.5)
    monkeypatch.delattr(process_clock.time, "CLOCK_BOOTTIME")
    assert process_clock.process_seconds() == 2.5


def test_a_start_is_counted_by_part() -> None:
    times = iter((10.0, 12.25, 12.28, 13.25, 14.0))
    clock = StartClock({"launcher": 1.5, "imports": 4.0}, lambda: next(times))
    for part in ("kernels", "data", "compiling", "kernels"):
        clock.end(part)
    assert str(clock) == "9.5 s: launcher 1.5, imports 4.0, kernels 3.0, compiling 1.0"


@pytest.mark.parametrize(("restarts", "launcher"), [("0", 2.0), ("1", 0.0), (None, 0.0)])
def test_the_launchers_first_start_counts(
    restarts: str | None, launcher: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {os.getpid(): 3.0, os.getppid(): 5.0}
    monkeypatch.setattr(process_clock, "seconds_since_start_of", seconds.get)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert process_clock.launch_seconds() == {"launcher": launcher, "imports": 3.0}


def test_advice_where_python_compiles_modules_at_each_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in container images whose packages were installed without that; the advice holds."""
    source = tmp_path / "site packages" / "package" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    spec = spec_from_file_location("package", source)
    assert spec is not None
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    advice = import_advice(module_from_spec(spec))
    folder = str(source.parents[1])
    assert advice.endswith(f"run once: python -m compileall -q -j 0 '{folder}'")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert import_advice(module_from_spec(spec)) == ""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    subprocess.run([sys.executable, *shlex.split(advice.rpartition("python ")[2])], check=True)
    assert import_advice(module_from_spec(spec)) == ""

"""Standard streams that are closed, full, without a reader, or of a narrow encoding."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from utils.config.command_line import report_user_errors
from utils.config.errors import UserError
from utils.config.standard_streams import prepare_standard_streams, print_error

FULL = Path("/dev/full")


def run(code: str, redirection: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code that starts with this module's functions, with a shell's redirection."""
    code = f"import os, sys\nfrom utils.config.standard_streams import *\n{code}"
    command = f'exec "{sys.executable}" -c "$CODE" {redirection}'
    return subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env={**os.environ, "CODE": code}, capture_output=True, text=True, check=False
    )


def test_the_next_file_does_not_get_the_output_of_closed_streams(tmp_path: Path) -> None:
    code = f"""
prepare_standard_streams()
print("from Python")
with open({str(tmp_path / "file")!r}, "w") as file:
    os.write(1, b"from C")
    os.write(2, b"from C")
    sys.exit(file.fileno() < 3)
"""
    done = run(code, ">&- 2>&-")
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("redirection", [">/dev/full", ">/dev/full 2>&1"])
def test_the_exit_code_is_that_of_the_work(redirection: str) -> None:
    code = "try:\n    print('x' * 99999)\nexcept OSError:\n    pass\nflush_standard_streams()"
    done = run(code, redirection)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_user_error_that_cannot_be_printed_still_has_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(SystemExit) as stop, report_user_errors():
            raise UserError("x")
        assert stop.value.code == 2
    print_error("to a closed file")


@pytest.mark.parametrize(
    ("encoding", "errors"), [("ascii", "strict"), ("ascii", "surrogateescape"), ("utf-8", "strict")]
)
def test_every_name_can_be_printed(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding, errors))
    prepare_standard_streams()
    print("é\udce9", end="", flush=True)
    assert buffer.getvalue() == ("é" if encoding == "utf-8" else "\\xe9").encode() + b"\\udce9"

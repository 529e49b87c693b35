"""The worker processes of the self-test."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
import torch

from models.kernels import dispatch
from models.kernels.self_test_pool import passed_in_workers
from tests.helpers import ROOT

CPU = torch.device("cpu")


def signal_itself(_: object) -> str:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return ""


def test_workers_find_what_this_process_finds(device: torch.device) -> None:
    """Of two cases one fails, since heads are wider than tokens."""
    cases = [("mlp", 16, 32, 6), ("mixer", 32, 64, 6)]
    solve = partial(dispatch.solve, device=device, dtype=torch.float32)
    done: list[int] = []
    passed = passed_in_workers(solve, cases, device=device, num_workers=2, advance=lambda: done.append(1))
    assert passed == {case for case in cases if solve(case) == ""} == {cases[0]}
    assert len(done) == 2


def test_signals_to_the_group_do_not_end_workers() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert passed_in_workers(signal_itself, [1], device=CPU, num_workers=1, advance=int) == {1}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_worker_that_dies() -> None:
    with pytest.raises(BrokenProcessPool):
        passed_in_workers(os._exit, [1, 2], device=CPU, num_workers=1, advance=int)  # type: ignore[arg-type]


def test_workers_of_an_unguarded_script_end_with_it(tmp_path: Path) -> None:
    """A script that imports its modules from elsewhere, as torch.hub does, and whose worker runs when it is killed."""
    script, note = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import torch
        from models.kernels.self_test_pool import passed_in_workers
        sys.path.pop(0)
        print("once", flush=True)
        command = "import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
        passed_in_workers(exec, [command], device=torch.device("cpu"), num_workers=1, advance=int)
        """)
    )
    with subprocess.Popen([sys.executable, script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        assert process.communicate()[0] == "once\n"
    worker = Path("/proc") / note.read_text()
    while worker.exists() and "\nState:\tZ" not in (worker / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or "\nState:\tZ" in (worker / "status").read_text()

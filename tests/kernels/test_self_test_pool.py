"""The worker processes of the self-test."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from models.kernels import dispatch, self_test_pool
from models.kernels.self_test_pool import passed_in_workers
from tests.helpers import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def _small_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test_pool, "IMPORTED", ["models.kernels.self_test_pool"])


def signal_itself(_: object) -> str:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return ""


def connections(_: object) -> str:
    return "" if os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" else "many"


def test_workers_find_what_this_process_finds(device: torch.device) -> None:
    """Of two cases one fails, since heads are wider than tokens."""
    cases = [("mlp", 16, 32, 6), ("mixer", 32, 64, 6)]
    solve = partial(dispatch.solve, device=device, dtype=torch.float32)
    done: list[int] = []
    passed = passed_in_workers(solve, cases, device=device, num_workers=2, advance=lambda: done.append(1))
    assert passed == {case for case in cases if solve(case) == ""} == {cases[0]}
    assert len(done) == 2


@pytest.mark.usefixtures("_small_server")
def test_signals_to_the_group_do_not_end_workers() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert passed_in_workers(signal_itself, [1], device=CPU, num_workers=1, advance=int) == {1}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.usefixtures("_small_server")
def test_workers_of_a_run_with_many_queues_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200, five processes with 32 queues each found room."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    assert passed_in_workers(connections, [1], device=CPU, num_workers=1, advance=int) == {1}


@pytest.mark.usefixtures("_small_server")
def test_processes_of_others_live_on() -> None:
    """As loader workers that begin while kernels are tested."""
    other = get_context("fork").Process(target=time.sleep, args=(600,))
    passed_in_workers(str, [1], device=CPU, num_workers=1, advance=int, meanwhile=other.start)
    try:
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


@pytest.mark.usefixtures("_small_server")
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
        from models.kernels import self_test_pool
        sys.path.pop(0)
        print("once", flush=True)
        command = "import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
        self_test_pool.IMPORTED = []
        self_test_pool.passed_in_workers(exec, [command], device=torch.device("cpu"), num_workers=1, advance=int)
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


@pytest.mark.parametrize(
    ("error", "passed", "is_repeated"),
    [
        (BrokenProcessPool, set(), True),
        (EOFError, set(), True),
        (BrokenProcessPool, {1}, False),  # it died while it worked
        (TimeoutError, set(), False),
    ],
)
def test_where_forks_cannot_use_the_gpu_workers_are_spawned(
    error: type[Exception], passed: set[int], is_repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods: list[str] = []

    def add(found: set[int], _: object, cases: list[int], method: str, meanwhile: Any, **__: Any) -> None:
        methods.append(method)
        meanwhile()
        found |= passed if method == "forkserver" else set(cases)
        if method == "forkserver":
            raise error

    monkeypatch.setattr(self_test_pool, "add_passed", add)
    monkeypatch.setattr(self_test_pool, "start_server", lambda: None)
    calls: list[int] = []
    settings = {"num_workers": 2, "advance": int, "meanwhile": lambda: calls.append(1)}
    with nullcontext() if is_repeated else pytest.raises(error):
        assert passed_in_workers(str, [1, 2], device=torch.device("cuda"), **settings) == {1, 2}
    assert methods == ["forkserver", "spawn"][: 1 + is_repeated]
    assert calls == [1]

"""Runs that are killed, asked to stop, or lose a process; `make soak` is the long form of the short campaign."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import data.sources.digits
from tests.faults.campaign import EQUAL, Campaign, Trial, table
from tests.faults.injections import FAULTS
from tests.faults.processes import descendants, is_running
from tests.faults.runs import Run, differing
from tests.faults.tasks import SETTINGS, SMALL
from tests.helpers import ROOT, THREE_DIGITS, run_python, wait_for
from utils.logs.output_dir import lock_output_dir

pytestmark = pytest.mark.slow

RunMain = Callable[..., tuple[int, str, str]]
ARGS = [
    "--cfg",
    "cfgs/digits.yaml",
    "--batch-size",
    "64",
    "--opts",
    *SETTINGS,
    *SMALL,
    *THREE_DIGITS,
    "TRAIN.EPOCHS",
    "2",
]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def two_processes_uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of an uninterrupted run on two processes."""
    run = Run(tmp_path_factory.mktemp("uninterrupted"), processes=2, epochs=2, save_steps=0, amp=False)
    run.finish(forked=True)
    return run.result()


@pytest.mark.timeout(900)
def test_short_campaign(tmp_path: Path, two_processes_uninterrupted: dict[str, Any]) -> None:
    """Weights, EMA, optimizer, random number generators, and metrics.jsonl end bit for bit as of a run left alone."""
    campaign = Campaign(tmp_path, epochs=2, injections=1)
    campaign.expected["classification", 2] = two_processes_uninterrupted
    trials = [
        campaign.trial(FAULTS[fault], task, processes, seed=0)
        for fault, task, processes in (
            ("kill-training", "classification", 2),
            ("kill-saving", "detection", 1),
            ("disk", "segmentation", 1),
        )
    ]
    assert all(trial.is_good for trial in trials), trials
    assert any(trial.injections for trial in trials), trials  # a run may end before its fault


def test_one_bit_is_a_difference() -> None:
    weights = torch.ones(3)
    other = {"model": {"a": weights, "b": [torch.nextafter(weights, 2 * weights)]}, "epoch": 1}
    assert differing({"model": {"a": weights, "b": [weights]}, "epoch": 1}, other) == ["model"]


def test_table_of_a_campaign() -> None:
    done = ("killed", "killed")
    trials = [
        Trial("kill-saving", "detection", 1, 0, done, EQUAL),
        Trial("kill-saving", "detection", 2, 0, done[:1], EQUAL),
        Trial("disk", "segmentation", 1, 0, ("went on",), "DIFFERENT: metrics", "/tmp/x"),
        Trial("bit", "detection", 1, 0, (), EQUAL),  # ended before the fault
    ]
    assert table(trials).splitlines()[2:] == [
        f"| SIGKILL while saving | 2 + 1 | 0 + 0 | killed | {EQUAL} |",
        "| the run folder's disk fills | 0 + 0 | 1 + 0 | went on | DIFFERENT |",
    ]


def test_a_killed_worker_is_restarted_by_torchrun(tmp_path: Path, two_processes_uninterrupted: dict[str, Any]) -> None:
    """With --max-restarts; the result equals that of an uninterrupted run."""
    run = Run(tmp_path, processes=2, epochs=2, save_steps=3, amp=False, max_restarts=3)
    process = run.start(forked=True)
    wait_for(lambda: list(run.folder.glob("ckpt_epoch_0_step_*.pth")))
    pid = int((run.folder / "run_holder.txt").read_text().split()[1])
    os.kill(pid, signal.SIGKILL)
    assert process.wait(200) == 0, run.printed()
    assert "resumed from" in run.printed()
    assert differing(two_processes_uninterrupted, run.result()) == []


def documented_launcher(port: int) -> tuple[list[str], dict[str, str]]:
    """Return arguments and environment of utils/README.md's SLURM launcher, for two launchers on this machine."""
    page = (ROOT / "utils" / "README.md").read_text()
    script = page[page.index("#!/bin/bash") :].split("```")[0]
    args = script[script.index("srun torchrun") + len("srun") : script.index("main.py")]
    settings = "SLURM_NNODES=2 SLURM_JOB_ID=1 head=127.0.0.1"
    shell = subprocess.run(["bash", "-ec", f"{settings}\nprintf '%s\n' {args}"], capture_output=True, check=True)
    program, *options = shell.stdout.decode().split()
    assert program == "torchrun"
    here = {
        "--nproc_per_node=8": "--nproc_per_node=1",
        "--rdzv-endpoint=127.0.0.1:29500": f"--rdzv-endpoint=127.0.0.1:{port}",
    }
    assert here.keys() < set(options)
    return [here.get(word, word) for word in options], dict(re.findall(r"^export (\w+)=(\w+)", script, re.MULTILINE))


def test_a_machine_that_is_lost_and_returns(
    tmp_path: Path, two_processes_uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launchers that meet on this host stand for two machines, one process each; the second is killed with all that
    it started, and started again. The result is that of two processes of one launcher.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    options, environment = documented_launcher(address[1])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = Run(tmp_path, processes=2, epochs=2, save_steps=3, amp=False)
    run.args[2 : run.args.index("main.py")] = [
        *options,
        "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=3",  # 3 s, not 15, until a machine counts as lost
    ]
    first = run.start(forked=True)
    wait_for(lambda: socket.socket().connect_ex(address) == 0)  # the first hosts the rendezvous
    second = run.start(forked=True)
    wait_for(lambda: list(run.folder.glob("ckpt_epoch_0_step_*.pth")))
    for pid in [second.pid, *descendants(second.pid)]:
        os.kill(pid, signal.SIGKILL)
    second.wait()
    time.sleep(8)  # by then it counts as lost; if it returned earlier, both launchers could wait forever
    second = run.start(forked=True)
    try:
        assert (first.wait(120), second.wait(120)) == (0, 0), run.printed()
    except subprocess.TimeoutExpired:
        for process in (first, second):
            process.terminate()
        pytest.fail(f"both wait forever:\n{run.printed()}")
    assert run.printed().count("2 processes on cpu") == 2
    assert re.search(r"resumed from \S+ckpt_epoch_\d_step_\d+.pth", run.printed())
    assert differing(two_processes_uninterrupted, run.result()) == []


def test_workers_save_and_stop_when_their_launcher_is_killed(tmp_path: Path) -> None:
    run = Run(tmp_path, processes=2, epochs=200, save_steps=0, amp=False)
    process = run.start(forked=True)
    wait_for(run.step_lines)
    workers = descendants(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_running, workers)))
    assert "the launcher has ended: stopped in epoch 1" in run.printed()
    assert list(run.folder.glob("ckpt_epoch_0_step_*.pth"))


def test_sigusr1_saves_and_the_same_command_resumes(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes within a step, while the second image of step 3 is read."""
    read, count = data.sources.digits.Digits.read, 0

    def read_and_signal(images: data.sources.digits.Digits, index: int) -> object:
        nonlocal count
        count += 1
        if count == 2 * 64 + 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return read(images, index)

    monkeypatch.setattr(data.sources.digits.Digits, "read", read_and_signal)
    args = ["--output", tmp_path, *ARGS, "DATA.NUM_WORKERS", "0"]
    code, out, _ = run_main(*args)
    assert code == 0
    assert "SIGUSR1: stopped in epoch 1 after step 3 of 6; run the same command to resume" in out
    folder = tmp_path / "mlla_digits" / "default"
    assert [path.name for path in folder.glob("*.pth")] == ["ckpt_epoch_0_step_3.pth"]
    shutil.copytree(tmp_path, tmp_path / "two")
    code, out, _ = run_main(*args)
    assert code == 0
    assert "ckpt_epoch_0_step_3.pth" in out
    assert not list(folder.glob("ckpt_epoch_*_step_*.pth"))  # deleted after a later one was saved
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    run = Run(tmp_path / "two", processes=2, epochs=2, save_steps=0, amp=False)
    run.args += THREE_DIGITS
    run.finish(forked=True)  # the same global batch size on two processes
    assert "was written by 1 processes, now there are 2" in run.printed()
    assert "resumed from" in run.printed()


def test_sigterm_to_the_group_during_imports_ends_the_process_quietly(tmp_path: Path) -> None:
    process = (run := Run(tmp_path, processes=1, epochs=200, save_steps=0, amp=False)).start()
    time.sleep(1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    assert "Traceback" not in run.printed()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_sigterm_to_the_group_while_compiling_ends_the_run_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal reaches the compilers and inductor's workers, too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    run = Run(tmp_path, processes=1, epochs=200, save_steps=0, amp=False)
    run.args += ["TRAIN.COMPILE", "default"]
    process = run.start(forked=True)

    def is_compiling() -> bool:
        names = (Path(f"/proc/{pid}/comm") for pid in descendants(process.pid))
        return "Global batch size" in run.printed() and any(
            name.read_text().strip() == "cc1plus" for name in names if name.exists()
        )

    wait_for(is_compiling)
    os.killpg(process.pid, signal.SIGTERM)
    start = time.monotonic()
    assert process.wait(60) == 0, run.printed()
    assert time.monotonic() - start < 30
    assert re.search(r"SIGTERM: stopped (while|in epoch 1) .*; run the same command to resume", run.printed())
    assert "Traceback" not in run.printed()


def test_a_second_run_in_the_same_folder_is_refused(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.logs.output_dir.LOCK_SECONDS", 0.5)
    folder = tmp_path / "mlla_digits" / "default"
    folder.mkdir(parents=True)
    with lock_output_dir(folder):
        code, _, err = run_main("--output", tmp_path, *ARGS)
    assert code == 2
    assert re.search(
        rf"a run writes here already, pid {os.getpid()} on \S+, since .*; stop it, or use another --tag", err
    )
    with lock_output_dir(folder):  # free again
        pass


def test_a_failing_process_ends_all_and_is_named(tmp_path: Path) -> None:
    start = time.monotonic()
    worker = "tests/utils/distributed/faulty_worker.py"
    done = run_python(*LAUNCHER, worker, "1", "--output", tmp_path, *ARGS, timeout=90, forked=True)
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    assert "process 1 of 2: IndexError: the injected fault" in done.stdout + done.stderr
    log = (tmp_path / "mlla_digits" / "default" / "log_rank1.txt").read_text()
    assert "the injected fault" in log
    assert "faulty_worker.py" in log  # with its traceback


@pytest.mark.parametrize(("number", "text"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_to_each_process_saves_on_all(tmp_path: Path, number: int, text: str) -> None:
    """Also to loader workers and the launcher, as SLURM's scancel sends it."""
    run = Run(tmp_path, processes=2, epochs=200, save_steps=0, amp=False)
    process = run.start(forked=True)
    wait_for(run.step_lines)
    workers = descendants(process.pid)
    for pid in [process.pid, *workers]:
        os.kill(pid, number)
    process.wait(60)
    wait_for(lambda: not any(map(is_running, workers)), 30)
    assert f"{text}: stopped in epoch" in run.printed()
    assert "has died" not in run.printed()
    assert list(tmp_path.glob("**/ckpt_epoch_*_step_*.pth"))


def test_a_killed_loader_worker_is_explained(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: object, __: int) -> object:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("read outside of a worker")

    monkeypatch.setattr(data.sources.digits.Digits, "read", die)
    code, out, _ = run_main("--output", tmp_path, *ARGS)
    assert code == 1
    assert "a worker process that loads images has died" in out
    assert "lower DATA.NUM_WORKERS" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_fails_the_run(run_main: RunMain, tmp_path: Path, policy: str) -> None:
    """A limit on file sizes simulates a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        code, out, _ = run_main("--output", tmp_path, *ARGS, "TRAIN.ON_SAVE_ERROR", policy, "DATA.NUM_WORKERS", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "ckpt_epoch_0.pth could not be saved (File too large); the newest checkpoint is none" in out
    assert "the last checkpoint could not be saved" in out
    assert ("ckpt_epoch_1.pth could not be saved" in out) == (policy == "continue")
    assert ("a checkpoint could not be saved: stopped in epoch 2 after step" in out) == (policy == "stop")
    assert not list((tmp_path / "mlla_digits" / "default").glob("*.pth*"))

"""Training and evaluation on several processes equal those of one."""

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.faults.processes import is_running
from tests.helpers import run_python, wait_for
from tests.utils.distributed.distributed_worker import make_model, run
from utils.config.errors import UserError
from utils.distributed.process import Process, sleep_while_waiting, start_process

pytestmark = pytest.mark.slow


def launch(processes: int, out: Path, batch_size: int, accumulation_steps: int) -> dict[str, Any]:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["tests/utils/distributed/distributed_worker.py", str(out), str(batch_size), str(accumulation_steps)]
    done = run_python(*command, forked=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run(Process(0, 1, torch.device("cpu")), batch_size=8, accumulation_steps=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(2, tmp_path_factory.mktemp("two") / "out.pt", 4, 1)


def test_a_launcher_that_times_out_leaves_no_process(tmp_path: Path) -> None:
    """Its worker runs in another session, as torchrun's do."""
    script = tmp_path / "launcher.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "worker = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(worker.pid))\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(script, tmp_path / "pid", timeout=3)
    worker = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_running(worker), 20)


def same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["derived"] == other["derived"]
    assert one["grad_norms"] == pytest.approx(other["grad_norms"], rel=1e-4)
    for kind in ("weights", "ema"):
        for name, value in one[kind].items():
            torch.testing.assert_close(value, other[kind][name], atol=1e-5, rtol=0, msg=name)


def test_two_processes_train_as_one(alone: dict[str, Any], two: dict[str, Any]) -> None:
    same_training(alone, two)


def test_accumulation_trains_as_one_batch(alone: dict[str, Any]) -> None:
    same_training(alone, run(Process(0, 1, torch.device("cpu")), batch_size=4, accumulation_steps=2))


def test_accumulation_on_two_processes(alone: dict[str, Any], tmp_path: Path) -> None:
    same_training(alone, launch(2, tmp_path / "out.pt", 2, 2))


def test_training_changes_the_weights(alone: dict[str, Any]) -> None:
    """Otherwise the comparisons above would pass without training."""
    moved = (alone["weights"]["head.weight"] - make_model().head.weight).abs().max()
    assert moved > 1e-4


def test_evaluation_is_exact_for_one_two_and_three_processes(
    alone: dict[str, Any], two: dict[str, Any], tmp_path: Path
) -> None:
    three = launch(3, tmp_path / "out.pt", 4, 1)
    for other in (two, three):
        assert alone["scores"][0] == other["scores"][0]
        assert alone["scores"][1] == other["scores"][1]
        assert alone["scores"][2] == pytest.approx(other["scores"][2], rel=1e-6)
        assert other["scores"][3] == 101


def test_all_processes_have_the_same_model_and_ema(two: dict[str, Any]) -> None:
    """Including batch statistics, which differ between processes before they are averaged."""
    first, second = two["digests"]
    assert first == second


def test_a_nonfinite_loss_on_one_process_stops_all_at_that_step(two: dict[str, Any]) -> None:
    assert two["bad_steps"] == [4, 4]


def test_only_rank_0_prints_the_error() -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py", "--cfg", "nothere.yaml"]
    done = run_python(*command, forked=True)
    assert done.returncode != 0
    printed, page = done.stderr.split("=" * 60, 1)  # torchrun's page has it too, of one process
    for text in (printed, page):
        assert text.count("error: nothere.yaml: no such configuration file") == 1


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 on this machine has no GPU of its own: there are 1"):
        start_process()


def test_the_driver_is_asked_to_let_waiting_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def get_device(handle: Any, ordinal: int) -> int:
        handle._obj.value = 10 + ordinal
        return 0

    driver = SimpleNamespace(
        cuInit=lambda _: 0,
        cuDeviceGet=get_device,
        cuDevicePrimaryCtxSetFlags_v2=lambda handle, flags: calls.append((handle.value, flags)),
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    sleep_while_waiting(torch.device("cuda", 3))
    assert calls == [(13, 4)]
    driver.cuInit = lambda _: 100  # there is no device
    sleep_while_waiting(torch.device("cuda", 3))
    assert len(calls) == 1


def test_a_driver_that_does_not_take_the_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    sleep_while_waiting(torch.device("cuda", 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_threads_sleep_while_they_wait_for_a_gpu() -> None:
    sleep_while_waiting(torch.device("cuda", 0))
    driver, handle, flags, is_active = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDeviceGet(ctypes.byref(handle), 0) == 0
    assert driver.cuDevicePrimaryCtxGetState(handle, ctypes.byref(flags), ctypes.byref(is_active)) == 0
    assert flags.value == 4

"""Memory that is needed and available, and the message for a GPU without enough of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.speed.memory import activation_bytes, cgroup_room, out_of_memory_message, read_meminfo

ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.1 GiB is free."
)


def test_remedies() -> None:
    message = out_of_memory_message(
        ERROR,
        work="DATA.BATCH_SIZE 128",
        batch_size=128,
        accumulation_steps=2,
        amp=False,
        can_checkpoint=True,
        smaller="lower DATA.IMG_SIZE",
    )
    assert message == (
        "out of GPU memory (23.65 GiB) with DATA.BATCH_SIZE 128: "
        "add --amp, or add --use-checkpoint (activation checkpointing), or lower --batch-size (for example to 64; "
        "--opts TRAIN.ACCUMULATION_STEPS 4 keeps the global batch size), or lower DATA.IMG_SIZE"
    )


def test_remedies_in_use_are_left_out() -> None:
    error = torch.OutOfMemoryError("out of memory")
    message = out_of_memory_message(
        error, work="it", batch_size=1, accumulation_steps=1, amp=True, can_checkpoint=False, smaller="use less"
    )
    assert message == "out of GPU memory with it: use less"
    message = out_of_memory_message(
        error, work="it", batch_size=8, accumulation_steps=None, amp=True, can_checkpoint=True, smaller="use less"
    )
    assert message.endswith("with it: lower --batch-size (for example to 4), or use less")


@pytest.mark.parametrize("args", [[], ["--throughput"], ["--throughput", "--train"]])
def test_a_run_reports_it_in_one_line(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    def fail(*_: object) -> None:
        raise ERROR

    monkeypatch.setattr("models.MLLA.forward", fail)
    code, out, err = run_main("--cfg", "cfgs/digits.yaml", "--output", tmp_path, "--batch-size", 30, *args)
    assert code == 1
    (line,) = [line for line in (out + err).splitlines() if "out of GPU memory" in line]
    assert "out of GPU memory (23.65 GiB) with DATA.BATCH_SIZE 30 images of 32x32 per process: add --amp, or" in line
    assert ("--use-checkpoint" in line) == (args != ["--throughput"])
    assert "Traceback" not in out + err


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_that_a_forward_pass_keeps(device: str) -> None:
    """For a batch of 2, floats of 4 bytes: the input, 4 wide; and both outputs of a ReLU, 8 and 16 wide."""
    blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 16), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.Linear(16, 1)).to(device)
    images = torch.zeros(2, 4, device=device)
    assert activation_bytes(lambda: model(images)) == 8 * (4 + 8 + 16)
    # The second block keeps its output; checkpointed, both keep that, and in addition what the larger one keeps inside.
    assert activation_bytes(lambda: model(images), blocks) == 8 * (8 + 16 + 16)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("limit", "expected"), [("1000\n", 1000 - 300 + 100), ("max\n", None)])
@pytest.mark.parametrize("version", [1, 2])
def test_room_in_a_control_group(tmp_path: Path, version: int, limit: str, expected: int | None) -> None:
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(limit)
    (folder / names[1]).write_text("300\n")
    (folder / "memory.stat").write_text(f"anon 200\n{'total_' if version == 1 else ''}inactive_file 100\n")
    assert cgroup_room(tmp_path) == expected
    assert cgroup_room(tmp_path / "none") is None


def test_memory_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert read_meminfo(tmp_path / "meminfo") == 5 * 1024
    assert read_meminfo(tmp_path / "none") is None

"""Out of GPU memory, without a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.speed.memory import out_of_memory_message

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
    (line,) = [line for line in (out + err).splitlines() if "memory" in line]
    assert "out of GPU memory (23.65 GiB) with DATA.BATCH_SIZE 30 images of 32x32 per process: add --amp, or" in line
    assert ("--use-checkpoint" in line) == (args != ["--throughput"])
    assert "Traceback" not in out + err

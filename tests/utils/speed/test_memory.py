"""A GPU whose memory does not suffice, without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.speed.memory import out_of_memory_message

ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.1 GiB is free."
)


def test_what_is_proposed() -> None:
    message = out_of_memory_message(
        ERROR,
        work="DATA.BATCH_SIZE 128",
        batch_size=128,
        accumulation_steps=2,
        amp=False,
        can_recompute=True,
        smaller="lower DATA.IMG_SIZE",
    )
    assert message == (
        "the GPU's memory of 23.65 GiB does not suffice for DATA.BATCH_SIZE 128: "
        "add --amp, or add --use-checkpoint, which recomputes the blocks, or lower --batch-size (to 64, say; with "
        "--opts TRAIN.ACCUMULATION_STEPS 4 a step has as many images), or lower DATA.IMG_SIZE"
    )


def test_what_is_in_use_is_not_proposed_again() -> None:
    error = torch.OutOfMemoryError("out of memory")
    message = out_of_memory_message(
        error, work="it", batch_size=1, accumulation_steps=1, amp=True, can_recompute=False, smaller="use less"
    )
    assert message == "the GPU's memory does not suffice for it: use less"
    message = out_of_memory_message(
        error, work="it", batch_size=8, accumulation_steps=None, amp=True, can_recompute=True, smaller="use less"
    )
    assert message.endswith("for it: lower --batch-size (to 4, say), or use less")


@pytest.mark.parametrize("words", [[], ["--throughput"], ["--throughput", "--train"]])
def test_a_run_says_it_in_one_line(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def fail(*_: object) -> None:
        raise ERROR

    monkeypatch.setattr("models.MLLA.forward", fail)
    code, out, err = run_main("--cfg", "cfgs/digits.yaml", "--output", tmp_path, "--batch-size", 30, *words)
    assert code == 1
    (line,) = [line for line in (out + err).splitlines() if "memory" in line]
    assert "does not suffice for DATA.BATCH_SIZE 30 images of 32x32 per process: add --amp, or" in line
    assert ("--use-checkpoint" in line) == (words != ["--throughput"])
    assert "Traceback" not in out + err

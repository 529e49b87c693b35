"""The self-test: its verdicts, and which cases a model needs."""

from collections.abc import Callable

import pytest
import torch

from models import MLLA, use_kernels
from models.kernels import dispatch
from models.kernels.self_test import kernel_cases, run_self_test

problems = pytest.importorskip("models.kernels.problems", exc_type=ImportError)

SIZES = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 0}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the log, as in a process that has said nothing yet."""
    lines: list[str] = []
    monkeypatch.setattr(dispatch.logger, "info", lambda line, *parts: lines.append(line % parts))
    dispatch.log_fallback_once.cache_clear()
    dispatch.self_test_verdict.cache_clear()
    return lines


def test_a_right_kernel_passes_and_leaves_random_numbers_alone(device: torch.device) -> None:
    state = torch.get_rng_state()
    assert dispatch.failed_self_test("mixer", device, torch.float32, 32, 32, 6) == ""
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_or_failing_kernel_does_not(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("models.kernels.ops", exc_type=ImportError)
    right: Callable[..., tuple[torch.Tensor, ...]] = ops.conv_silu

    def wrong(*args: object) -> tuple[torch.Tensor, ...]:
        active, before = right(*args)
        return active * 1.01, before

    def failing(*_: object) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("a compiler's words\nin two lines")

    for replacement, words in ((wrong, "is off by"), (failing, "in two lines")):
        monkeypatch.setattr(ops, "conv_silu", replacement)
        assert words in problems.find_error("mixer", device, torch.float32, 32, 32, rows=6, batch=2)


def test_cases_of_a_model() -> None:
    """Grids of 17 x 17 tokens at width 16, 9 x 9 at 32; each case once, none for modules that are not "auto"."""
    model = MLLA(**SIZES)  # type: ignore[arg-type]
    assert kernel_cases(model, 68) == []
    expected = [("mixer", 16, 16, 17), ("mixer", 32, 16, 12), ("mlp", 16, 32, 17), ("mlp", 32, 32, 12)]
    expected += [("mlp_branch", 16, 32, 17), ("mlp_branch", 32, 32, 12), ("stem_conv", 8, 32, 6)]
    assert kernel_cases(use_kernels(model), 68) == [*expected, ("wide_conv", 128, 32, 17)]
    assert {case[3] for case in kernel_cases(model, (16, 400))} == {6}
    model.layers[0].blocks[0].out_proj.register_forward_hook(lambda *_: None)
    assert ("mixer", 16, 16, 17) not in kernel_cases(model, 68)  # it falls back in any case
    assert kernel_cases(use_kernels(model, "triton"), 68) == []


def test_set_up_tests_once_and_logs_one_line(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    tested: list[tuple[object, ...]] = []
    monkeypatch.setattr(problems, "find_error", lambda *case, **_: tested.append(case) or "")
    model = use_kernels(MLLA(**SIZES)).to(device).eval()  # type: ignore[arg-type]
    run_self_test(model, torch.float32, 16)
    run_self_test(model, torch.float32, 16)
    assert log == ["Triton kernels passed their self-test: mixer, mlp, mlp_branch, stem_conv, wide_conv; "
                   "widths 8, 16, 32, 128; float32"] * 2  # fmt: skip
    assert len(tested) == len(set(tested)) == len(kernel_cases(model, 16))
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16, device=device))  # finds all verdicts
    assert len(tested) == len(set(tested)) == len(kernel_cases(model, 16))
    dispatch.self_test_verdict.cache_clear()


def test_set_up_logs_what_falls_back(device: torch.device, monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    monkeypatch.setattr(problems, "find_error", lambda kernel, *_, **__: "it is wrong" if kernel == "mlp" else "")
    model = use_kernels(MLLA(**SIZES)).to(device)  # type: ignore[arg-type]
    run_self_test(model, torch.float32, 16)
    assert log == ["Triton kernels: falls back to eager PyTorch: it is wrong"]
    dispatch.self_test_verdict.cache_clear()


def test_set_up_without_triton(log: list[str]) -> None:
    run_self_test(MLLA(**SIZES), torch.float32, 16)  # type: ignore[arg-type]
    run_self_test(use_kernels(MLLA(**SIZES).to("meta")), torch.float32, 16)  # type: ignore[arg-type]
    assert log == []
    run_self_test(use_kernels(MLLA(**SIZES)), torch.float32, 16)  # type: ignore[arg-type]
    assert log == ["Triton kernels: falls back to eager PyTorch: there is no Triton for the device cpu"]

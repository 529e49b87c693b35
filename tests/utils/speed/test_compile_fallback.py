"""Regions that cannot be compiled run eagerly."""

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from utils.speed import compile, compile_fallback
from utils.speed.compile import compile_regions
from utils.training.launch import MissingCompilerError, explain_missing_compiler


class Doubling(nn.Module):
    is_region = True

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values


class Halving(Doubling):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values / 2


class FailingBackend:
    """A compiler that raises an error in its n-th call."""

    def __init__(self, failing_call: int, error: Exception) -> None:
        self.calls, self.failing_call, self.error = 0, failing_call, error

    def __call__(self, _: torch.fx.GraphModule) -> None:
        self.calls += 1
        if self.calls == self.failing_call:
            raise self.error


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the log."""
    lines: list[str] = []
    monkeypatch.setattr(compile_fallback.logger, "warning", lambda line, *args: lines.append(line % args))
    return lines


def compiled_regions(monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any]) -> nn.Sequential:
    """Return two Doubling and one Halving module, whose compiler calls the given one first."""
    torch._dynamo.reset()
    compile_module = nn.Module.compile

    def compile_eagerly(module: nn.Module, **_: Any) -> None:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            backend(graph)
            return make_boxed_func(graph.forward)

        compile_module(module, backend=aot_autograd(fw_compiler=compiler))

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    monkeypatch.setattr(compile, "start_compile_workers", lambda: None)
    model = nn.Sequential(Doubling(), Doubling(), Halving())
    compile_regions(model, "default")
    return model


def test_regions_that_cannot_be_compiled_run_eagerly(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """The line names the class and the reason, once per class; other classes are compiled."""
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule) -> None:
        calls.append("mul" if "mul" in graph.code else "div")
        if calls[-1] == "mul":
            raise TypeError("cannot determine truth value")

    model = compiled_regions(monkeypatch, backend)
    for _ in range(3):
        assert model(torch.ones(2)).tolist() == [2, 2]
    assert calls == ["mul", "div"]
    assert len(said) == 1
    assert said[0].startswith("Doubling falls back to eager PyTorch, torch.compile failed: BackendCompiler")
    assert "TypeError: cannot determine truth value" in said[0]


def test_regions_are_compiled_again_without_workers_that_died(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    backend = FailingBackend(1, BrokenProcessPool("terminated abruptly"))
    with torch._inductor.config.patch(compile_threads=2):
        assert compiled_regions(monkeypatch, backend)(torch.ones(2)).tolist() == [2, 2]
        assert torch._inductor.config.compile_threads == 1
    assert backend.calls == 4  # and once for each region
    assert said == ["a process of torch.compile has died, from lack of memory perhaps; compiling without it"]


@pytest.mark.skipif(
    not hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"), reason="needs a newer torch"
)
def test_regions_whose_backward_pass_cannot_be_compiled_run_eagerly(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    backend = FailingBackend(2, TypeError("out of resources"))
    values = torch.ones(2, requires_grad=True)
    compiled_regions(monkeypatch, backend)[0](values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2, 2]
    assert len(said) == 1
    assert "Doubling falls back" in said[0]


def test_a_missing_compiler_is_no_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(_: torch.fx.GraphModule) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    with pytest.raises(MissingCompilerError), explain_missing_compiler("TRAIN.COMPILE default"):
        compiled_regions(monkeypatch, backend)(torch.ones(2))

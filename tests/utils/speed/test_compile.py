"""Compile modes, and the graphed training step, with a CUDA graph that is simulated on the CPU."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from models import MLLA, prepare_for_inference
from tests.helpers import note_compiled_modules
from tests.utils.training.test_train_step import batch, small_step
from utils.speed import compile
from utils.speed.compile import (
    GRAPHS,
    MIN_RECORDED_STEPS,
    MIN_TRAINING_FLOPS,
    Capture,
    CapturedModel,
    compile_regions,
    effective_mode,
    resolve_inference_mode,
    resolve_training_mode,
    uses_graphs,
)
from utils.training import graphed_step
from utils.training.graphed_step import NUM_WARMUP_STEPS, GraphedTrainStep, graph_unsupported_reason
from utils.training.launch import MissingCompilerError, explain_missing_compiler
from utils.training.optimizer import make_optimizer, parameter_groups

CPU = torch.device("cpu")


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_training_mode("auto", CPU, num_steps=10**6) == "off"
    assert resolve_training_mode("default", CPU, num_steps=1) == "default"
    assert resolve_inference_mode("auto", CPU, for_speed=True) == "off"
    assert resolve_inference_mode("default", CPU) == "default"
    gpu = torch.device("cuda", 0)
    assert resolve_inference_mode("auto", gpu) == GRAPHS
    monkeypatch.setattr(compile, "compile_unsupported_reason", lambda _: "")
    assert resolve_inference_mode("auto", gpu, for_speed=True) == "reduce-overhead"
    assert resolve_training_mode("auto", gpu, num_steps=10**6, auto="default") == "default"
    monkeypatch.setattr(compile, "compile_unsupported_reason", lambda _: "Triton is not installed")
    assert resolve_inference_mode("auto", gpu, for_speed=True) == GRAPHS
    for num_steps, mode in ((MIN_RECORDED_STEPS - 1, "off"), (MIN_RECORDED_STEPS, GRAPHS)):
        assert resolve_training_mode("auto", gpu, num_steps=num_steps, auto=GRAPHS) == mode
    assert resolve_training_mode("auto", CPU, num_steps=10**6, auto=GRAPHS) == "off"
    assert uses_graphs(GRAPHS, gpu)
    assert uses_graphs("reduce-overhead", torch.device("cuda"))
    assert not uses_graphs("reduce-overhead", CPU)
    assert not uses_graphs("default", torch.device("cuda"))
    assert [
        effective_mode(mode, is_captured=False) for mode in ("off", "default", "reduce-overhead", "max-autotune")
    ] == [*("off", "default", "default", "max-autotune-no-cudagraphs")]
    assert effective_mode(GRAPHS, is_captured=False) == "off"
    assert effective_mode("reduce-overhead", is_captured=True) == "reduce-overhead"


def test_auto_is_off_where_a_gpu_has_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compile.logger, "info", lambda line, *args: said.append(line % args))
    monkeypatch.setattr(compile, "find_spec", lambda *_: object())
    monkeypatch.setattr(compile.shutil, "which", lambda *_: None)
    for compiler, mode in ((None, GRAPHS), ("/usr/bin/cc", "reduce-overhead")):
        monkeypatch.delenv("CC", raising=False)
        if compiler:
            monkeypatch.setenv("CC", compiler)
        compile.compile_unsupported_reason.cache_clear()
        assert [resolve_training_mode("auto", torch.device("cuda", 0), num_steps=10**6) for _ in range(2)] == [mode] * 2
    assert said == ["torch.compile is off: Triton needs a C compiler: install gcc or clang, or let CC name one"]
    monkeypatch.setattr(compile, "find_spec", lambda *_: None)
    compile.compile_unsupported_reason.cache_clear()
    assert resolve_training_mode("auto", torch.device("cuda", 0), num_steps=10**6) == GRAPHS
    assert resolve_training_mode("auto", torch.device("cuda", 0), num_steps=10**6, auto="default") == "off"
    assert said[1:] == ["torch.compile is off: Triton is not installed"]
    compile.compile_unsupported_reason.cache_clear()


def test_auto_leaves_a_short_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compile.logger, "info", lambda line, *args: said.append(line % args))
    monkeypatch.setattr(compile, "compile_unsupported_reason", lambda _: "")
    gpu = torch.device("cuda", 0)
    assert resolve_training_mode("auto", gpu, num_steps=10**6, flops=MIN_TRAINING_FLOPS) == "reduce-overhead"
    assert resolve_training_mode("auto", gpu, num_steps=10**6, flops=2e15) == GRAPHS
    assert said == ["TRAIN.COMPILE auto: graphs, since the run is short: 2 PFLOP; compiling pays off from 30 on"]
    assert resolve_training_mode("auto", gpu, num_steps=10**6, flops=2e15, auto="default") == "off"
    assert resolve_training_mode("reduce-overhead", gpu, num_steps=1, flops=0) == "reduce-overhead"


def test_missing_c_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/cc")
    line = r"TEST\.COMPILE default: torch\.compile needs a C compiler, .*CC is /no/cc.*such as gcc, or leave it off"
    with pytest.raises(MissingCompilerError, match=line), explain_missing_compiler("TEST.COMPILE default"):
        raise RuntimeError("RuntimeError: Failed to find C compiler. Please specify via CC environment variable")
    with pytest.raises(RuntimeError, match="else"), explain_missing_compiler("TEST.COMPILE default"):
        raise RuntimeError("something else")


def test_regions_are_compiled_or_else_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = note_compiled_modules(monkeypatch)
    model = MLLA(img_size=32, embed_dim=16, depths=(1, 2), num_heads=(1, 2))
    compile_regions(model, "off")
    assert not compiled
    compile_regions(model, "default")
    assert sorted(type(module).__name__ for module in compiled) == ["Downsample", *["MLLABlock"] * 3, "Stem"]
    compiled.clear()
    linear = nn.Linear(2, 2)
    compile_regions(linear, "max-autotune")
    assert compiled == [linear]


@pytest.mark.parametrize(
    ("device", "has_one_shape", "is_dynamic"), [("meta", True, False), ("meta", False, None), ("cpu", False, False)]
)
def test_sizes_are_symbolic_only_where_they_vary_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, has_one_shape: bool, is_dynamic: bool | None
) -> None:
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, **settings: kept.append(settings))
    compile_regions(nn.Linear(2, 2, device=device), "default", has_one_shape=has_one_shape)
    assert kept == [{"mode": None, "dynamic": is_dynamic}]


@pytest.fixture
def failing_capture(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let captures on the CPU fail at their end as CUDA's do after an error inside; return what is called."""
    calls: list[str] = []

    @contextmanager
    def graph(graph: str, pool: object, stream: object, mode: str) -> Iterator[None]:  # noqa: ARG001
        calls.append(graph)
        try:
            yield
        except ValueError:
            raise RuntimeError("a capture has failed before") from None

    cuda = {"current_device": lambda: 0, "synchronize": lambda: None, "empty_cache": lambda: None, "graph": graph}
    cuda |= {"CUDAGraph": lambda: f"graph {len(calls)}", "graph_pool_handle": lambda: (0, 7)}
    for name, function in {**cuda, "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: calls.append("zeros"))
    monkeypatch.setattr(compile, "on_side_stream", lambda *_: nullcontext())
    monkeypatch.setattr(compile, "side_stream", lambda *_: None)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: calls.append(f"{name} {args}"), raising=False)
    return calls


def test_a_failed_capture_is_cleaned_up_and_says_why(failing_capture: list[str]) -> None:
    """The memory pool is closed, and another capture sets the random generator right."""

    def fail() -> None:
        raise ValueError("what the function itself says")

    with pytest.raises(ValueError, match="the function itself"):
        Capture(fail, warmup_calls=0)
    pool = ["_cuda_endAllocateToPool (0, (0, 7))", "_cuda_releasePool (0, (0, 7))"]
    assert failing_capture == ["graph 0", *pool, "graph 3", "zeros"]


FORBIDDEN: dict[str, Callable[[], object]] = {
    "synchronize": lambda: torch.cuda.synchronize(),
    "item": lambda: torch.ones(1, device="cuda").item(),
    "another stream": lambda: torch.cuda.default_stream().wait_stream(torch.cuda.current_stream()),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FORBIDDEN)
def test_everything_works_after_a_failed_capture(name: str) -> None:
    """Random numbers continue, also those of earlier graphs; memory is freed; and the current stream is the same."""
    device, stream = torch.device("cuda", 0), torch.cuda.current_stream()
    torch.manual_seed(0)
    drawn = [torch.rand(4, device=device) for _ in range(3)]
    earlier = Capture(lambda: torch.rand(4, device=device), warmup_calls=0)
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        with pytest.raises(RuntimeError):
            Capture(lambda: (torch.rand(2**22, device=device), FORBIDDEN[name]()), warmup_calls=0)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.memory_reserved() <= reserved + 2**23
    torch.manual_seed(0)
    found = [torch.rand(4, device=device), earlier().clone(), torch.rand(4, device=device)]
    assert all(one.equal(other) for one, other in zip(drawn, found, strict=True))


class SimulatedCapture:
    """Simulates a CUDA graph: a capture computes nothing, and a replay uses the optimizer's settings of the capture."""

    recordings = 0

    def __init__(self, optimizer: torch.optim.Optimizer, function: Callable[[], Any], warmup_calls: int = 3) -> None:
        assert warmup_calls == 0
        self.groups, self.function = optimizer.param_groups, function
        self.recorded = [dict(group) for group in self.groups]
        assert all(isinstance(group["lr"], torch.Tensor) for group in self.recorded)
        SimulatedCapture.recordings += 1

    def __call__(self) -> Any:
        present = [dict(group) for group in self.groups]
        for settings in (self.recorded, present):
            for group, values in zip(self.groups, settings, strict=True):
                group["lr"] = values["lr"]
            if settings is self.recorded:
                result = self.function()
        return result


def graphed(eager: Any, monkeypatch: pytest.MonkeyPatch | None = None) -> GraphedTrainStep:
    """Return the graphed step, with a simulated graph if `monkeypatch` is given."""
    if monkeypatch:
        monkeypatch.setattr(graphed_step, "Capture", partial(SimulatedCapture, eager.optimizer))
    return GraphedTrainStep(
        eager.model,
        eager.optimizer,
        eager.precision,
        compute_losses=eager.compute_losses,
        clip_grad=eager.max_norm,
        ema=eager.ema,
    )


def test_graphed_step_equals_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate changes, MESA starts at step 8, and there are two batch sizes; each case is captured once."""
    SimulatedCapture.recordings = 0
    torch.manual_seed(1)
    batches = [batch(8) for _ in range(16)] + [batch(4) for _ in range(6)]
    results = []
    for recorded in (False, True):
        model, train_step = small_step(mesa_ratio=1.0)
        train_step.compute_losses.mesa_start_step = 8  # type: ignore[attr-defined]
        step: Any = graphed(train_step, monkeypatch) if recorded else train_step
        losses = [step([b], step=i, learning_rate=0.01 * (i + 1)).loss.item() for i, b in enumerate(batches)]
        rates = [group["lr"] for group in train_step.optimizer.param_groups]
        assert rates == [0.01 * len(batches)] * len(rates)
        results.append((losses, model[1].weight.detach().clone(), train_step.ema.module[1].weight.clone()))  # type: ignore
        assert step.check_finite(99) is None
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1:], results[1][1:])
    assert SimulatedCapture.recordings == 3
    assert NUM_WARMUP_STEPS < 6


def test_compiling_ahead_has_no_consequences_and_leaves_nothing_to_compile() -> None:
    model, train_step = small_step()
    model.append(nn.BatchNorm1d(4))  # type: ignore[operator]
    step, graphs = graphed(train_step), []

    def compile_graph(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model.compile(backend=compile_graph)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step.compile_ahead(batch(8), 0)
    assert len(graphs) == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    for i in range(2):
        step([batch(8)], step=i, learning_rate=0.1)
    assert len(graphs) == 1


def test_graphed_step_stops_at_a_nonfinite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train_step = small_step()
    step = graphed(train_step, monkeypatch)
    images, targets = batch()
    for i in range(6):
        step([(images, targets)], step=i, learning_rate=0.01)
    before = model[1].weight.detach().clone()  # type: ignore[index]
    step([(images * float("nan"), targets)], step=6, learning_rate=0.01)
    step([(images, targets)], step=7, learning_rate=0.01)
    assert step.check_finite(7) == 6
    assert torch.equal(model[1].weight, before)  # type: ignore[index]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_capture_restores_the_optimizer_settings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """So a checkpoint has the same content as without graphs."""
    _, train_step = small_step()
    train_step.optimizer = make_optimizer(name, parameter_groups(train_step.model, 0.05))
    before = [dict(group) for group in train_step.optimizer.param_groups]
    graphed(train_step, monkeypatch).record([batch()], 0)
    assert train_step.optimizer.param_groups == before


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_that_cannot_be_captured_runs_without_a_graph(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Also where the capture fails between the unscaling of gradients and the update."""
    said: list[str] = []
    monkeypatch.setattr(graphed_step.logger, "warning", lambda line, *args: said.append(line % args))

    def fail(*_: object, **__: object) -> None:
        train_step.precision.scaler.unscale_(train_step.optimizer)
        raise RuntimeError("operation not permitted when stream is capturing")

    weights = []
    for is_graphed in (False, True):
        model, train_step = small_step(dtype)
        step: Any = graphed(train_step) if is_graphed else train_step
        monkeypatch.setattr(graphed_step, "Capture", fail)
        torch.manual_seed(1)
        for i in range(NUM_WARMUP_STEPS + 3):
            step([batch()], step=i, learning_rate=0.01)
        weights.append(model[1].weight.detach().clone())  # type: ignore[index]
    torch.testing.assert_close(*weights)
    assert len(said) == 1
    assert "could not be captured: operation not permitted" in said[0]


def test_nccl_cannot_be_captured_with_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    _, train_step = small_step()
    train_step.found_inf = torch.zeros((), device="meta")
    monkeypatch.setattr(torch.Tensor, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert graph_unsupported_reason(train_step) == ""
    train_step.exchange = object()  # type: ignore[assignment]
    assert "expandable_segments" in graph_unsupported_reason(train_step)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x, x.mean(dim=1)], lambda x: {"map": x}])
def test_a_short_batch_is_computed_in_the_graph_of_a_full_one(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[[torch.Tensor], Any]
) -> None:
    captures = []

    def capture(function: Callable[[], Any]) -> Callable[[], Any]:
        captures.append(function)
        return function

    monkeypatch.setattr(compile, "Capture", capture)
    model = nn.Module()
    model.forward = lambda images: wrap(images.flatten(1) * 2)  # type: ignore[method-assign]
    captured = CapturedModel(model, max_shapes=2)
    for count, expected in ((8, 1), (5, 1), (4, 1), (3, 2), (8, 2), (9, 2)):
        images = torch.randn(count, 3, 2, 2)
        torch.testing.assert_close(captured(images), wrap(images.flatten(1) * 2))
        assert len(captures) == expected


def test_graph_unsupported_reason() -> None:
    _, train_step = small_step()
    assert graph_unsupported_reason(train_step) == "there is no GPU"


@torch.no_grad()
def test_prepared_model_computes_the_same() -> None:
    model = MLLA(img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    images = torch.randn(2, 3, 64, 64)
    prepared = prepare_for_inference(model, torch.float32)
    torch.testing.assert_close(prepared(images), model(images), atol=1e-5, rtol=1e-5)
    with torch.enable_grad():
        torch.testing.assert_close(prepared(images), model(images), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    halved = prepare_for_inference(model, torch.bfloat16)
    assert halved.layers[0].blocks[0].in_proj.weight.dtype == torch.bfloat16
    assert halved.norm.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(halved(images).float(), model(images).float(), atol=0.1, rtol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphed_step_on_a_gpu(dtype: str) -> None:
    """A real CUDA graph, with a changing learning rate, MESA from step 8 on, and a nonfinite loss in step 14."""
    device = torch.device("cuda")
    torch.manual_seed(1)
    batches = [batch(8, device) for _ in range(16)]
    batches[14] = (batches[14][0] * float("nan"), batches[14][1])
    results = []
    for recorded in (False, True):
        model, train_step = small_step(dtype, mesa_ratio=1.0, device=device)
        train_step.compute_losses.mesa_start_step = 8  # type: ignore[attr-defined]
        step: Any = graphed(train_step) if recorded else train_step
        losses = [step([b], step=i, learning_rate=0.01 * (i + 1)).loss.item() for i, b in enumerate(batches)]
        assert step.check_finite(99) == 14
        results.append((losses[:14], model[1].weight.detach().clone()))  # type: ignore[index]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=1e-3)


def test_the_cache_of_compiled_code_knows_the_source_of_the_regions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not hasattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"):
        pytest.skip("this torch does not keep autograd functions on disk")
    monkeypatch.setattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions", False)
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    monkeypatch.setattr(compile.inspect, "getfile", lambda _: str(tmp_path / "region.py"))
    monkeypatch.setenv("TORCH_COMPILE_CACHE_KEY_TAG", "")
    tags_of_workers = []
    environment = compile.os.environ
    monkeypatch.setattr(
        *(compile, "start_compile_workers"),
        lambda: tags_of_workers.append(environment["TORCH_COMPILE_CACHE_KEY_TAG"]),
    )
    note_compiled_modules(monkeypatch)
    region, tags = nn.Linear(1, 1), []
    region.is_region = True  # type: ignore[assignment]
    for text in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "region.py").write_text(text)
        compile_regions(region, "default")
        tags.append(torch.compiler.config.cache_key_tag)
    assert torch._functorch.config.autograd_cache_allow_custom_autograd_functions
    assert tags[0] == tags[2] != tags[1]
    assert tags_of_workers == tags

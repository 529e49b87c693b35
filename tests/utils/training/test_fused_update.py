"""The fused update against torch's clipping, AdamW and EMA; its kernels are tested in tests/kernels."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.utils.training.test_train_step import batch, small_step
from utils.training import fused_update_support
from utils.training.ema import ModelEma
from utils.training.fused_update import FusedUpdate
from utils.training.fused_update_support import make_fused_update, unsupported_reason
from utils.training.graphed_step import NUM_WARMUP_STEPS, GraphedTrainStep
from utils.training.optimizer import make_optimizer, parameter_groups
from utils.training.train_step import TrainStep

CPU = torch.device("cpu")
SIZES = ((40, 110), (5,), (3, 5, 7, 9), (1,), (64,))
STEPS, BAD_STEP, LATE_STEP = 6, 2, 3
EMA_KINDS: list[dict[str, bool]] = [{"with_ema": False}, {"warmup": False}, {"warmup": True}]


def train(
    kind: str,
    device: torch.device = CPU,
    *,
    sizes: tuple[tuple[int, ...], ...] = SIZES,
    offset: int = 0,
    with_ema: bool = True,
    warmup: bool = False,
    max_norm: float = 2.0,
) -> dict[str, Tensor]:
    """Return norms, weights, EMA and state after some steps of a kind: torch, kernels or reference.

    Two groups with their own rate and weight decay. Step 2 has `found_inf`; the last parameter gets its first gradient
    in step 3, the one before it none at all. With an `offset` of 1 element gradients are not aligned.
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterList([torch.randn(size, generator=generator) for size in sizes]).to(device)
    model[2].data = model[2].data.to(memory_format=torch.channels_last)
    model.register_buffer("statistics", torch.ones(3, device=device))
    model.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
    ema = ModelEma(model, 0.9, warmup=warmup) if with_ema else None
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2], "weight_decay": 0.2}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = make_optimizer("adamw", groups, betas=(0.9, 0.99))
    fused = None if kind == "torch" else FusedUpdate(optimizer, ema, use_kernels=kind == "kernels")
    norms = []
    for step in range(STEPS):
        for i, p in enumerate(parameters):
            values = torch.randn(p.numel() + offset, generator=generator).to(device) * 10.0 ** (-step / 2)
            is_used = i < len(parameters) - 2 or (i == len(parameters) - 1 and step >= LATE_STEP)
            p.grad = values.as_strided(p.shape, p.stride(), offset) if is_used else None
        model.statistics.add_(1)  # type: ignore[operator, union-attr]
        model.count.add_(1)  # type: ignore[operator, union-attr]
        groups[0]["lr"], groups[1]["lr"] = 0.01 * (step + 1), 0.002
        for group, values_of in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = values_of["lr"]
        found_inf = torch.tensor(float(step == BAD_STEP), device=device)
        if ema is not None:
            ema.set_step(step)
        if fused is None:
            norms.append(nn.utils.clip_grad_norm_(parameters, max_norm))
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
            if ema is not None:
                ema.update()
        else:
            fused.set_learning_rates()
            norms.append(fused.grad_norm())
            fused(norms[-1], found_inf, max_norm)
    results = {"norms": torch.stack(norms), **{f"model.{name}": value for name, value in model.state_dict().items()}}
    if ema is not None:
        results |= {f"ema.{name}": value for name, value in ema.module.state_dict().items()}
    for i, p in enumerate(parameters):
        results |= {f"state.{i}.{name}": value for name, value in optimizer.state.get(p, {}).items()}
    return results


def assert_equal_runs(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare; torch 2.14 rounds 1 - beta to float32 from a rounded beta, a few millionths off in the second moment."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        rtol = 1e-5 if name.endswith("exp_avg_sq") else 5e-7
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=2e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("ema", EMA_KINDS)
@pytest.mark.parametrize("max_norm", [2.0, float("inf")])
def test_reference_equals_torch(ema: dict[str, bool], max_norm: float) -> None:
    """Also the state is that of torch: of the same names and order, and none without gradient."""
    fused = train("reference", **ema, max_norm=max_norm)
    assert_equal_runs(fused, train("torch", **ema, max_norm=max_norm))
    assert fused["state.0.step"] == STEPS - 1
    assert fused["state.4.step"] == STEPS - LATE_STEP
    assert not any(name.startswith("state.3") for name in fused)


def with_reference(train_step: TrainStep) -> TrainStep:
    train_step.choose_update = lambda: FusedUpdate(train_step.optimizer, train_step.ema, use_kernels=False)
    return train_step


def test_a_training_step_is_the_same() -> None:
    """With layer-wise rates, and with state that the optimizer loads between two steps."""
    torch.manual_seed(1)
    batches = [batch() for _ in range(6)]
    results = []
    for is_fused in (True, False):
        model, train_step = small_step(mesa_ratio=1.0)
        train_step.optimizer.param_groups[0]["lr_scale"] = 0.5
        if is_fused:
            with_reference(train_step)
        for i, micro_batch in enumerate(batches):
            result = train_step([micro_batch], step=i, learning_rate=0.02)
            train_step.optimizer.load_state_dict(copy.deepcopy(train_step.optimizer.state_dict()))
        assert train_step.ema is not None
        weights = [*model.state_dict().values(), *train_step.ema.module.state_dict().values()]
        results.append([result.loss, result.grad_norm, *weights])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model, train_step = small_step()
    with_reference(train_step)
    train_step([batch()], step=0, learning_rate=0.1)
    before = copy.deepcopy(model.state_dict())
    images, targets = batch()
    train_step([(images * float("nan"), targets)], step=1, learning_rate=0.1)
    train_step([batch()], step=2, learning_rate=0.1)
    assert train_step.check_finite(99) == 1
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_addresses_are_sent_when_a_gradient_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2, bias=False)
    fused = FusedUpdate(make_optimizer("adamw", parameter_groups(model, 0.05)), None, use_kernels=False)
    sent: list[list[int]] = []
    monkeypatch.setattr(fused, "send_addresses", lambda: sent.append(fused.host_addresses[0].tolist()))
    gradients = [torch.ones(2, 3), torch.ones(7)[1:].view(2, 3)]
    for gradient in (gradients[0], gradients[0], gradients[1]):
        model.weight.grad = gradient
        fused.grad_norm()
    assert [row[1] for row in sent] == [gradient.data_ptr() for gradient in gradients]
    state = fused.optimizer.state[model.weight]
    tensors = (model.weight, gradients[1], state["exp_avg"], state["exp_avg_sq"], None, state["step"])
    assert sent[-1] == [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def small_optimizer(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [p]} for p in model.parameters()], **settings)


def test_what_is_not_supported() -> None:
    model = nn.Linear(3, 2)
    assert unsupported_reason(small_optimizer(model), ModelEma(model, 0.9)) in ("", "Triton is not installed")
    assert "AdamW" in unsupported_reason(small_optimizer(model, amsgrad=True), None)
    assert "SGD" in unsupported_reason(make_optimizer("sgd", [{"params": list(model.parameters())}]), None)
    optimizer = small_optimizer(model)
    optimizer.param_groups[1]["betas"] = (0.5, 0.9)
    assert "betas" in unsupported_reason(optimizer, None)
    assert "float32" in unsupported_reason(small_optimizer(nn.Linear(3, 2).double()), None)
    transposed = nn.ParameterList([torch.randn(2, 3).t()])
    assert "contiguous" in unsupported_reason(small_optimizer(transposed), None)
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = small_optimizer(conv)
    optimizer.state[conv.weight] = {"exp_avg": torch.zeros(4, 4, 3, 3)}
    assert "strides" in unsupported_reason(optimizer, None)
    assert (
        make_fused_update(small_optimizer(model), None, torch.amp.GradScaler("cpu", enabled=False), is_alone=True)
        is None
    )  # no GPU


def test_failed_self_test_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bool:
        raise RuntimeError("first line\nno compiler")

    monkeypatch.setattr(fused_update_support, "VERDICTS", {})
    monkeypatch.setattr(fused_update_support, "passes_self_test", fail)
    assert fused_update_support.self_test_error(CPU) == "RuntimeError: no compiler"
    monkeypatch.setattr(fused_update_support, "passes_self_test", lambda *_: False)
    assert "compiler" in fused_update_support.self_test_error(CPU)  # tested once
    assert "differs" in fused_update_support.find_error("update", CPU)
    fused_update_support.set_verdict("update", CPU, "")
    assert fused_update_support.self_test_error(CPU) == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_equal_torch_on_a_gpu() -> None:
    device = torch.device("cuda")
    for offset, ema in itertools.product((0, 1), EMA_KINDS):
        runs = [train(kind, device, offset=offset, **ema) for kind in ("kernels", "torch")]
        assert_equal_runs(*runs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("ema_warmup", [True, False])
def test_graph_and_eager_step_give_the_same_bits(is_fused: bool, ema_warmup: bool) -> None:
    """No step waits for the GPU, either; two shapes are captured, and step 14 is not finite."""
    device = torch.device("cuda")
    torch.manual_seed(1)
    batches = [batch(8, device) for _ in range(8)] + [batch(4, device) for _ in range(8)]
    batches[14] = (batches[14][0] * float("nan"), batches[14][1])
    results = []
    for is_graphed in (False, True):
        model, step = small_step(mesa_ratio=1.0, device=device, ema_warmup=ema_warmup)
        fused = make_fused_update(step.optimizer, step.ema, step.precision.scaler, is_alone=True)
        assert fused is not None
        fused = fused if is_fused else None
        options = {"compute_losses": step.compute_losses, "clip_grad": step.max_norm, "ema": step.ema}
        step_class = GraphedTrainStep if is_graphed else TrainStep
        step = step_class(model, step.optimizer, step.precision, **options, choose_update=lambda fused=fused: fused)  # type: ignore[arg-type]
        for i, micro_batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("default" if is_graphed or i == 0 else "error")
            step([micro_batch], step=i, learning_rate=0.01 * (i + 1))
        torch.cuda.set_sync_debug_mode("default")
        assert step.check_finite(99) == 14
        assert step.ema is not None
        state = [value for p in model.parameters() for value in step.optimizer.state[p].values()]
        results.append([*model.state_dict().values(), *step.ema.module.state_dict().values(), *state])
        if isinstance(step, GraphedTrainStep):
            assert step.capture is not None
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert NUM_WARMUP_STEPS < 7

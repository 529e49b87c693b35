"""The training step against the golden trajectory and injected faults."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from config import load_config
from data import build_targets
from main import Classification
from models import MLLA
from tests.helpers import GOLDEN, MICRO, fill_weights, random_values
from utils.distributed.process import Process, trained_buffers
from utils.training.amp import make_precision
from utils.training.build import build_ema, build_optimizer, build_train_step
from utils.training.ema import ModelEma
from utils.training.losses import ClassificationLoss
from utils.training.metrics import NoImagesError, evaluate
from utils.training.optimizer import make_optimizer, parameter_groups
from utils.training.train_step import StepResult, TrainStep

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class GoldenRun:
    """The run behind the golden trajectory, 24 steps in 12 epochs; torch's default dtype must be float64."""

    def __init__(self) -> None:
        opts = {
            "DATA.BATCH_SIZE": 8,
            "TRAIN.EPOCHS": 12,
            "TRAIN.WARMUP_EPOCHS": 2,
            "TRAIN.BASE_LR": 1e-3 * 64,  # the rates are for 512 images a step, these steps have 8
            "TRAIN.WARMUP_LR": 1e-6 * 64,
            "TRAIN.MIN_LR": 1e-5 * 64,
            "EMA.DECAY": 0.9**512,
            "EMA.WARMUP": "off",  # as in the official code, and here in its runs of ImageNet's length
            "AUG.MESA": 1.0,
        }
        self.config = load_config("cfgs/mlla_t.yaml", flags=opts)
        task = Classification()
        derived = task.derive(self.config, num_processes=1, num_train_images=16)
        self.model = MLLA(**MICRO, num_classes=10).train()
        fill_weights(self.model)
        ema = build_ema(self.config, self.model, derived)
        assert ema is not None
        self.ema = ema
        self.optimizer = build_optimizer(self.config, task.parameter_groups(self.config, self.model))
        self.schedule = task.schedule(self.config, derived)
        self.precision = make_precision(CPU, amp=False, dtype="auto")
        parts = (self.config, self.model, ALONE, self.optimizer, ema, self.precision, derived)
        self.train_step = build_train_step(task, *parts)
        self.train_step.compute_losses.mesa_start_step = 8  # type: ignore[attr-defined]  # where the recording has it

    @staticmethod
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (8, 3, 64, 64) and soft targets (8, 10)."""
        images = random_values(1000 + step % 4, 8, 3, 64, 64).double()
        return images, (3 * random_values(2000 + step % 4, 8, 10).double()).softmax(1)

    def take(self, step: int) -> StepResult:
        return self.train_step([self.batch(step)], step=step, learning_rate=self.schedule.lr_at(step))


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_golden_trajectory() -> None:
    """24 steps of the recipe in float64: schedule, clipping, AdamW, EMA and, from step 8 on, MESA."""
    golden, run = np.load(GOLDEN / "mlla_micro_64_trajectory.npz"), GoldenRun()
    losses, norms, rates = [], [], []
    for step in range(24):
        result = run.take(step)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    assert run.train_step.check_finite(99) is None
    np.testing.assert_allclose(rates, golden["lrs"], rtol=1e-6)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-6)
    np.testing.assert_allclose(norms, golden["grad_norms"], rtol=1e-6)
    assert [len(group["params"]) for group in run.optimizer.param_groups] == golden["n_decay"].tolist()
    probe = random_values(7, 4, 3, 64, 64).double()
    with torch.no_grad():
        np.testing.assert_allclose(run.model.eval()(probe), golden["logits"], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(run.ema.module(probe), golden["ema_logits"], rtol=1e-6, atol=1e-7)


class Network(nn.Sequential):
    """A class of our own: up to torch 2.6 at least, torch's are not compiled."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images)


def small_step(
    dtype: str = "float32", *, mesa_ratio: float = 0.0, device: torch.device = CPU, ema_warmup: bool = False
) -> tuple[nn.Module, TrainStep]:
    torch.manual_seed(0)
    model = Network(nn.Flatten(), nn.Linear(12, 4)).to(device)
    precision = make_precision(device, amp=dtype != "float32", dtype=dtype)
    optimizer = make_optimizer("adamw", parameter_groups(model, 0.05))
    ema = ModelEma(model, 0.9, warmup=ema_warmup)
    loss = ClassificationLoss(model, ema.module, mesa_ratio=mesa_ratio, mesa_start_step=1)
    return model, TrainStep(model, optimizer, precision, compute_losses=loss, clip_grad=1.0, ema=ema)


def batch(size: int = 8, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 3, 2, 2, device=device), torch.randn(size, 4, device=device).softmax(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_precision_learns(dtype: str) -> None:
    _, train_step = small_step(dtype)
    images, targets = batch()
    losses = [train_step([(images, targets)], step=i, learning_rate=0.05).loss.item() for i in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert train_step.precision.scaler.is_enabled() == (dtype == "float16")
    assert train_step.check_finite(99) is None


def test_micro_batches_are_one_batch() -> None:
    images, targets = batch(8)
    results = []
    for split in (8, 4, 2):
        model, train_step = small_step()
        micro_batches = list(zip(images.split(split), targets.split(split), strict=True))
        loss = train_step(micro_batches, step=0, learning_rate=0.1).loss
        results.append((loss, model[1].weight.detach().clone()))  # type: ignore[index]
    for loss, weight in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(weight, results[0][1])


def test_layer_wise_rates() -> None:
    """A group's `lr_scale` is its factor of the rate; without gradients AdamW only decays, by rate x weight decay."""
    _, train_step = small_step()
    decayed, others = train_step.optimizer.param_groups
    decayed["lr_scale"] = 0.25
    train_step([batch()], step=0, learning_rate=0.4)
    assert (decayed["lr"], others["lr"]) == (0.1, 0.4)


def test_only_the_head_of_a_frozen_model_moves() -> None:
    """Neither weights nor statistics of the rest do, in the model and in its average, whatever drops there."""
    torch.manual_seed(0)
    model = MLLA(**{**MICRO, "embed_dim": 8, "num_heads": (1, 1, 1, 1), "drop_path_rate": 0.5}, num_classes=4)
    model.freeze_backbone()
    ema = ModelEma(model, 0.9)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer("adamw", parameter_groups(model, 0.05))
    loss = ClassificationLoss(model, ema.module, mesa_ratio=1.0)
    precision = make_precision(CPU, amp=False, dtype="auto")
    train_step = TrainStep(model, optimizer, precision, compute_losses=loss, clip_grad=1.0, ema=ema)
    assert trained_buffers(model) == []
    images, targets = torch.randn(8, 3, 32, 32), torch.randn(8, 4).softmax(1)
    losses = []
    for step in range(20):
        model.train()
        losses.append(train_step([(images, targets)], step=step, learning_rate=0.01).loss.item())
    assert losses[-1] < losses[0]
    for state in (model.state_dict(), ema.module.state_dict()):
        moved = {name for name, value in state.items() if not value.equal(before[name])}
        assert moved == {"head.weight", "head.bias"}


def test_mesa_asks_the_ema_model_from_its_first_step_on() -> None:
    _, train_step = small_step(mesa_ratio=2.0)
    images, targets = batch()
    plain = train_step([(images, targets)], step=0, learning_rate=0.0).loss
    with_mesa = train_step([(images, targets)], step=1, learning_rate=0.0).loss
    assert with_mesa > plain


def test_mesa_waits_for_a_good_teacher_where_the_ema_warms_up() -> None:
    """It is asked while the last evaluation has it within a point; without warm-up, as in the official code, always."""
    model, train_step = small_step(ema_warmup=True)
    ema = train_step.ema
    assert ema is not None
    loss = ClassificationLoss(model, ema.module, mesa_ratio=2.0, mesa_start_step=1, is_ready=lambda: ema.is_teacher)
    assert not loss.variant(1)  # no evaluation yet
    for scores, is_asked in (((90.0, 20.0), False), ((90.0, 88.9), False), ((90.0, 89.0), True), ((90.0, 91.0), True)):
        ema.scores = dict(zip(("model", "EMA"), scores, strict=True))
        assert loss.variant(1) == is_asked
        assert not loss.variant(0)
    official = ModelEma(model, 0.9)
    official.scores = {"model": 90.0, "EMA": 20.0}
    assert official.is_teacher


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(dtype: str, value: float) -> None:
    model, train_step = small_step(dtype)
    good, bad = batch(), batch()
    bad[0][0, 0, 0, 0] = value
    train_step([good], step=0, learning_rate=0.1)
    before = copy.deepcopy(model.state_dict())
    for step in (1, 2):
        train_step([bad], step=step, learning_rate=0.1)
    assert train_step.check_finite(99) == 1
    train_step([good], step=3, learning_rate=0.1)  # later steps change nothing either
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, train_step = small_step()
    model[1].weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    train_step([batch()], step=5, learning_rate=0.1)
    assert train_step.check_finite(99) == 5
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_float16_overflow_is_left_to_the_scaler() -> None:
    model, train_step = small_step("float16")
    images, targets = batch()
    model[1].weight.register_hook(lambda grad: grad * 1e38)  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    scale = train_step.precision.scaler.get_scale()
    train_step([(images, targets)], step=0, learning_rate=0.1)
    assert train_step.check_finite(99) is None
    assert train_step.precision.scaler.get_scale() < scale
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_float16_that_always_overflows_is_reported() -> None:
    model, train_step = small_step("float16")
    model[1].weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore[index]
    micro_batches = [batch()]
    for step in range(40):
        train_step(micro_batches, step=step, learning_rate=0.1)
    assert train_step.check_finite(39) == 39


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_asks_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Mixup, the step with MESA, and the loop between two reports call nothing that synchronizes with a GPU."""
    torch.manual_seed(0)
    model = MLLA(**{**MICRO, "embed_dim": 8, "num_heads": (1, 1, 1, 1), "drop_path_rate": 0.1}, num_classes=4).train()
    precision = make_precision(CPU, amp=dtype != "float32", dtype=dtype)
    optimizer = make_optimizer("adamw", parameter_groups(model, 0.05))
    ema = ModelEma(model, 0.9)
    loss = ClassificationLoss(model, ema.module, mesa_ratio=1.0)
    train_step = TrainStep(model, optimizer, precision, compute_losses=loss, clip_grad=1.0, ema=ema)
    make_targets = build_targets(load_config("cfgs/mlla_t.yaml"), num_classes=4)

    def refuse(*_: object) -> None:
        raise AssertionError("the host asked the device for a value")

    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for step in range(3):
        train_step([make_targets(images.clone(), labels)], step=step, learning_rate=0.01)
    monkeypatch.undo()
    assert train_step.check_finite(2) is None


def test_terms_of_a_loss_are_summed_and_reported() -> None:
    model, train_step = small_step()
    plain = train_step.compute_losses
    train_step.compute_losses = lambda batch, step: {"a": plain(batch, step)["loss"], "b": model[1].bias.sum()}  # type: ignore[index]
    results = train_step([batch(), batch()], step=0, learning_rate=0.0)
    assert list(results.terms) == ["a", "b"]
    assert results.loss == results.terms["a"] + results.terms["b"]
    assert torch.all(model[1].bias.grad != 0)  # type: ignore[index, union-attr]


def test_evaluation_counts_by_hand() -> None:
    """Logits are the first pixels: top-1 and top-5 of six classes, over batches of uneven size."""

    class Reader(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :6]

    images = torch.zeros(3, 3, 2, 2)
    images[:, 0, 0] = torch.tensor([5.0, 4.0])
    images[:, 0, 1] = torch.tensor([3.0, 2.0])
    images[:, 1, 0] = torch.tensor([1.0, 0.0])
    loader = DataLoader(list(zip(images, [0, 4, 5], strict=True)), batch_size=2)  # type: ignore[arg-type]
    scores = evaluate({"": Reader()}, loader, ALONE, make_precision(CPU, amp=False, dtype="auto"))[""]
    assert scores.acc1 == pytest.approx(100 / 3)
    assert scores.acc5 == pytest.approx(200 / 3)
    logits = torch.tensor([5.0, 4, 3, 2, 1, 0])
    expected = sum(-logits.log_softmax(0)[label].item() for label in (0, 4, 5)) / 3
    assert scores.loss == pytest.approx(expected)
    assert scores.num_images == 3
    with pytest.raises(NoImagesError, match="no validation image could be used"):
        evaluate({"": Reader()}, [], ALONE, make_precision(CPU, amp=False, dtype="auto"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_never_waits_for_the_gpu(dtype: str) -> None:
    device = torch.device("cuda")
    _, train_step = small_step(dtype, mesa_ratio=1.0, device=device)
    micro_batches = [batch(device=device)]
    train_step(micro_batches, step=1, learning_rate=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            train_step(micro_batches, step=step, learning_rate=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert train_step.check_finite(99) is None

import math

import pytest
import torch
from torch import nn

from utils.training.losses import ClassificationLoss, training_loss

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_soft_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4 and 1/4
    targets = torch.tensor([[0.9, 0.1]])
    expected = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    assert training_loss(logits, targets).item() == pytest.approx(expected)


def test_mesa_adds_the_teachers_cross_entropy() -> None:
    logits, targets = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5).softmax(1)
    teacher = torch.randn(4, 5)
    second = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    loss = training_loss(logits, targets, teacher, ratio=1.5)
    torch.testing.assert_close(loss, training_loss(logits, targets) + 1.5 * second)


def test_sixteen_bits_are_widened() -> None:
    logits, targets = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).softmax(1)
    assert training_loss(logits, targets).dtype is torch.float32
    assert training_loss(logits.double(), targets.double()).dtype is torch.float64


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_loss_waits_for_its_teacher(device: str) -> None:
    """Beside the model, on a GPU: one that takes a while, asked many times, with other work on its memory after."""
    torch.manual_seed(0)
    model, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).to(device) for _ in range(2))
    if device == "cuda":
        teacher.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10**7))  # clock cycles
    compute = ClassificationLoss(model, teacher, mesa_ratio=1.0, mesa_start_step=1)
    for _ in range(30):
        images, targets = torch.randn(64, 3, 8, 8, device=device), torch.randn(64, 5, device=device).softmax(1)
        loss = compute((images, targets), 1)["loss"]
        copies = images.clone(), targets.clone()
        images.zero_()
        expected = training_loss(model(copies[0]), copies[1], teacher(copies[0]).detach(), 1.0)
        torch.testing.assert_close(loss, expected)
        assert compute((images, targets), 0)["loss"].isfinite()

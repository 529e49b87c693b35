import math

import pytest
import torch

from utils.losses import training_loss


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

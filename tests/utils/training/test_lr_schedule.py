import math
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler

from utils.training.lr_schedule import ClassificationSchedule, DenseSchedule


def schedule(name: str = "cosine", **changes: float) -> ClassificationSchedule:
    settings = {"base_lr": 1.0, "warmup_lr": 0.1, "min_lr": 0.01, "warmup_steps": 3, "total_steps": 10}
    return ClassificationSchedule(name=name, **{**settings, **changes})  # type: ignore[arg-type]


def test_cosine_by_hand() -> None:
    """Time runs one step behind, warm-up is linear, and cosine counts from time 0: after warm-up it starts below 1."""
    rates = [schedule().lr_at(step) for step in range(13)]
    cosine = [0.505 + 0.495 * math.cos(math.pi * t / 10) for t in range(3, 10)]
    assert rates == pytest.approx([0.1, 0.1, 0.4, 0.7, *cosine, 0.01, 0.01])


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_cosine_and_step_are_timms(name: str) -> None:
    """During cool-down, too."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    shared = {"warmup_t": 3, "warmup_lr_init": 0.1, "t_in_epochs": False}
    scheduler: Any
    if name == "cosine":
        scheduler = CosineLRScheduler(optimizer, t_initial=10, lr_min=0.01, cycle_limit=1, **shared)
    else:
        scheduler = StepLRScheduler(optimizer, decay_t=4, decay_rate=0.5, warmup_prefix=False, **shared)
    for step in range(20):
        rate = schedule(name, decay_steps=4, decay_rate=0.5).lr_at(step)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step)


def test_linear_ends_at_one_percent() -> None:
    rates = [schedule("linear").rate_at(t) for t in (0, 3, 10, 12)]
    assert rates == pytest.approx([0.1, 1.0, 0.01, 0.01])
    assert schedule("linear").rate_at(5) == pytest.approx(1 - 0.99 * 2 / 7)


def test_step_by_hand() -> None:
    rates = [schedule("step", decay_steps=4, decay_rate=0.5).rate_at(t) for t in (2, 3, 4, 7, 8, 12, 20)]
    assert rates == pytest.approx([0.7, 1.0, 0.5, 0.5, 0.25, 0.125, 0.03125])


def test_no_warmup() -> None:
    assert schedule(warmup_steps=0).lr_at(0) == 1.0


def test_dense_schedule_steps_down_at_milestones_after_warmup() -> None:
    schedule = DenseSchedule("step", 1e-4, 1000, 500, 0.001, [800, 900])
    rates = {0: 1e-7, 250: 1e-4 * 0.5005, 499: 1e-4 * (1 - 0.999 / 500), 500: 1e-4, 799: 1e-4, 800: 1e-5, 900: 1e-6}
    for step, rate in rates.items():
        assert schedule.lr_at(step) == pytest.approx(rate), step


def test_dense_linear_schedule_falls_to_zero_during_warmup_too() -> None:
    schedule = DenseSchedule("linear", 6e-5, 160_000, 1500, 1e-6)
    rates = {0: 6e-11, 750: 6e-5 * (1 - 750 / 160_000) * 0.5000005, 1500: 6e-5 * (1 - 1500 / 160_000), 80_000: 3e-5}
    for step, rate in rates.items():
        assert schedule.lr_at(step) == pytest.approx(rate), step
    assert schedule.lr_at(159_999) == pytest.approx(6e-5 / 160_000)

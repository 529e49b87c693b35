import pytest

from downstream.backbone import MLLABackbone
from tests.helpers import MICRO
from utils.training.recipe import WarmupSchedule, parameter_groups


def test_norms_and_position_tables_are_not_decayed_but_biases_are() -> None:
    model = MLLABackbone(**MICRO, ape=True)
    decayed, others = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in others["params"]}
    assert {"norm0.bias", "absolute_pos_embed", "layers.0.downsample.conv.2.norm.weight"} <= kept
    assert {"patch_embed.conv1.norm.weight", "layers.0.blocks.0.norm1.weight"} <= kept
    assert len(decayed["params"]) + len(kept) == len(names)
    assert "layers.0.blocks.0.in_proj.bias" in {names[id(p)] for p in decayed["params"]}


def test_steps_down_at_milestones_after_warmup() -> None:
    schedule = WarmupSchedule("step", 1e-4, 1000, 500, 0.001, [800, 900])
    rates = {0: 1e-7, 250: 1e-4 * 0.5005, 499: 1e-4 * (1 - 0.999 / 500), 500: 1e-4, 799: 1e-4, 800: 1e-5, 900: 1e-6}
    for step, rate in rates.items():
        assert schedule.lr_at(step) == pytest.approx(rate), step


def test_linear_falls_to_zero_during_warmup_too() -> None:
    schedule = WarmupSchedule("linear", 6e-5, 160_000, 1500, 1e-6)
    rates = {0: 6e-11, 750: 6e-5 * (1 - 750 / 160_000) * 0.5000005, 1500: 6e-5 * (1 - 1500 / 160_000), 80_000: 3e-5}
    for step, rate in rates.items():
        assert schedule.lr_at(step) == pytest.approx(rate), step
    assert schedule.lr_at(159_999) == pytest.approx(6e-5 / 160_000)

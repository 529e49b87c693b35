"""Lengths and scaled rates of a run, against values computed by hand."""

import re

import pytest

from config import load_config
from main import Classification, mesa_start_epoch
from utils.config.schema import ConfigError
from utils.training.derived import Derived, few_steps_warning
from utils.training.lr_schedule import ClassificationSchedule


def derived_of(*opts: str, processes: int = 8, images: int = 1_281_167) -> tuple[Derived, ClassificationSchedule]:
    task, config = Classification(), load_config("cfgs/mlla_t.yaml", opts)
    derived = task.derive(config, num_processes=processes, num_train_images=images)
    return derived, task.schedule(config, derived)


def test_values_of_the_papers_run() -> None:
    derived, schedule = derived_of(processes=32)
    assert mesa_start_epoch(derived) == 75
    assert derived.global_batch_size == 4096
    assert schedule.base_lr == pytest.approx(4e-3)
    assert schedule.warmup_lr == pytest.approx(4e-6)
    assert schedule.min_lr == pytest.approx(4e-5)
    assert not derived.ema_warmup
    assert derived.steps_per_epoch == 312
    assert schedule.warmup_steps == 20 * 312
    assert schedule.total_steps == 300 * 312
    assert derived.ema_decay == pytest.approx(0.9996)


def test_values_scale_with_processes_and_accumulation() -> None:
    derived, schedule = derived_of("TRAIN.ACCUMULATION_STEPS", "2", "TRAIN.COOLDOWN_EPOCHS", "10", processes=1)
    assert derived.global_batch_size == 256
    assert schedule.base_lr == pytest.approx(2.5e-4)
    assert derived.ema_decay == pytest.approx(0.9996 ** (1 / 16))
    assert derived.steps_per_epoch == 5004
    assert (derived.total_epochs, schedule.total_steps) == (310, 300 * 5004)
    assert mesa_start_epoch(derived) == 77  # a quarter of all epochs


@pytest.mark.parametrize(
    ("images", "epochs", "warmup"),
    [
        (1_281_167, 300, False),  # the paper's: 9,384 steps of 4,096 images until MESA starts: 0.01% is left
        (1_281_167, 100, True),  # 0.9996 ** 7,819 = 4% after a quarter of the run
        (2_000, 30, True),
    ],
)
@pytest.mark.parametrize("processes", [1, 8])
def test_warmup_of_the_ema_in_runs_too_short_for_its_decay(
    images: int, epochs: int, warmup: bool, processes: int
) -> None:
    for cfg in ("t", "s", "b"):
        config = load_config(f"cfgs/mlla_{cfg}.yaml", ["TRAIN.EPOCHS", str(epochs)])
        derived = Classification().derive(config, num_processes=processes, num_train_images=images)
        assert derived.ema_warmup == warmup
    assert derived_of("TRAIN.EPOCHS", str(epochs), "EMA.WARMUP", "on", images=images)[0].ema_warmup
    assert not derived_of("TRAIN.EPOCHS", str(epochs), "EMA.WARMUP", "off", images=images)[0].ema_warmup


@pytest.mark.parametrize(
    ("images", "opts", "processes", "expected"),
    [
        (1280, (), 1, ""),
        (300, (), 1, "300 training images at 128 per step make 2 steps per epoch, .* --batch-size 16 makes 18, "),
        (300, ("TRAIN.ACCUMULATION_STEPS", "2"), 1, "make 1 step .* --batch-size 16 --opts .*STEPS 1 makes 18, "),
        (1500, (), 8, "make 1 step per epoch, .* --batch-size 16 makes 11, "),
        (8, ("DATA.BATCH_SIZE", "2", "AUG.MIXUP", "0", "AUG.CUTMIX", "0"), 1, "--batch-size 1 makes 8"),
        (4, ("DATA.BATCH_SIZE", "1", "AUG.MIXUP", "0", "AUG.CUTMIX", "0"), 1, ""),  # nothing to propose
    ],
)
def test_few_steps_per_epoch_have_a_warning_with_a_proposal(
    images: int, opts: tuple[str, ...], processes: int, expected: str
) -> None:
    config = load_config("cfgs/mlla_t.yaml", opts)
    sizes = {"num_processes": processes, "num_train_images": images}
    text = few_steps_warning(config, Classification().derive(config, **sizes), **sizes)
    assert re.search(expected, text) if expected else not text


def test_global_batch_larger_than_the_training_set() -> None:
    with pytest.raises(ConfigError, match="128 x 8 processes is more than the 1000 training"):
        derived_of(images=1000)

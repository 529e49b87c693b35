"""Lengths and scaled rates, derived from configuration, number of processes and size of the training set."""

import math
from dataclasses import dataclass
from typing import Any

from utils.config.errors import ConfigError

# EMA.WARMUP auto is on if, at this share of the run, more than this share of the initial weights is left in the EMA.
# MESA's teacher starts there. In the paper's run it is 0.01%.
EMA_SETTLED_AT, MAX_INITIAL_SHARE = 0.25, 0.001
FEWEST_STEPS = 10  # per epoch, below which there is a warning


@dataclass(frozen=True)
class Derived:
    """Lengths and scaled rates of a run; the configuration itself stays unscaled.

    Attributes:
        global_batch_size: images per optimizer step, over all processes.
        steps_per_epoch: optimizer steps per epoch.
        total_epochs: epochs of the run; an epoch is the stretch between two evaluations.
        lr_scale: factor of the configured learning rates (linear scaling rule).
        ema_decay: decay of the EMA per step.
        ema_warmup: let the EMA's decay rise with the steps, see `ModelEma`.
    """

    global_batch_size: int
    steps_per_epoch: int
    total_epochs: int
    lr_scale: float
    ema_decay: float
    ema_warmup: bool

    @property
    def total_steps(self) -> int:
        return self.total_epochs * self.steps_per_epoch


def derive(
    config: Any,
    *,
    num_processes: int,
    total_epochs: int,
    steps_per_epoch: int,
    lr_batch_size: int,
    ema_batch_size: int,
) -> Derived:
    """Return the lengths and scaled rates of a run.

    Args:
        config: the whole configuration.
        num_processes: number of processes that train together.
        total_epochs: epochs of the run.
        steps_per_epoch: optimizer steps per epoch.
        lr_batch_size: global batch size that the configured learning rates are for; they scale linearly.
        ema_batch_size: global batch size that EMA.DECAY is for; a step of n times as many images decays n times.
    """
    size = global_batch_size(config, num_processes)
    ema_decay = config.EMA.DECAY ** (size / ema_batch_size)
    is_short = ema_decay ** (EMA_SETTLED_AT * total_epochs * steps_per_epoch) > MAX_INITIAL_SHARE
    return Derived(
        global_batch_size=size,
        steps_per_epoch=steps_per_epoch,
        total_epochs=total_epochs,
        lr_scale=size / lr_batch_size,
        ema_decay=ema_decay,
        ema_warmup=config.EMA.WARMUP == "on" or (config.EMA.WARMUP == "auto" and is_short),
    )


def global_batch_size(config: Any, num_processes: int) -> int:
    """Return the number of images per optimizer step, over all processes and gradient accumulation steps."""
    return config.DATA.BATCH_SIZE * num_processes * config.TRAIN.ACCUMULATION_STEPS


def few_steps_warning(config: Any, derived: Derived, *, num_processes: int, num_train_images: int) -> str:
    """Return a warning where an epoch has so few steps that it teaches little, with a proposal; "" where it has not."""
    images_per_step = derived.global_batch_size
    is_one_pass = derived.steps_per_epoch == num_train_images // images_per_step
    batch_size = 2 ** int(math.log2(max(1, num_train_images / (FEWEST_STEPS * num_processes))))
    if not is_one_pass or derived.steps_per_epoch >= FEWEST_STEPS or batch_size * num_processes >= images_per_step:
        return ""
    steps = "1 step" if derived.steps_per_epoch == 1 else f"{derived.steps_per_epoch} steps"
    accumulation = " --opts TRAIN.ACCUMULATION_STEPS 1" if config.TRAIN.ACCUMULATION_STEPS > 1 else ""
    return (
        f"{num_train_images} training images at {images_per_step} per step make {steps} per epoch, which teach little; "
        f"--batch-size {batch_size}{accumulation} makes "
        f"{num_train_images // (batch_size * num_processes)}, and the learning rate follows"
    )


def steps_per_pass(config: Any, *, num_processes: int, num_train_images: int) -> int:
    """Return the number of whole optimizer steps in one pass over the training set.

    Raises:
        ConfigError: the training set is too small for one step.
    """
    steps = num_train_images // global_batch_size(config, num_processes)
    if steps == 0:
        accumulation = config.TRAIN.ACCUMULATION_STEPS
        product = f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE}"
        product += f" x {num_processes} processes" if num_processes > 1 else ""
        product += f" x {accumulation} accumulation steps" if accumulation > 1 else ""
        raise ConfigError(
            f"{product} is more than the {num_train_images} training images; lower --batch-size", key="DATA.BATCH_SIZE"
        )
    return steps

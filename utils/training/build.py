"""From a configuration to the parts of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from yacs.config import CfgNode

from utils.config.yaml_file import flatten
from utils.logs.logger import logger
from utils.logs.plots import Panel
from utils.logs.wandb_logger import WandbLogger
from utils.speed.compile import GRAPH_MODES, compile_regions, resolve_mode
from utils.speed.memory import out_of_memory_message
from utils.training.amp import Precision, make_precision
from utils.training.ema import ModelEma
from utils.training.graphed_step import GraphedTrainStep, graph_unsupported_reason
from utils.training.losses import ClassificationLoss
from utils.training.lr_schedule import Schedule
from utils.training.optimizer import make_optimizer, parameter_groups
from utils.training.train_step import TrainStep
from utils.training.trainer import TrainerConfig


def build_precision(config: CfgNode, device: torch.device) -> Precision:
    return make_precision(device, amp=config.AMP, dtype=config.AMP_DTYPE)


def build_optimizer(config: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    settings = config.TRAIN.OPTIMIZER
    return make_optimizer(
        settings.NAME,
        parameter_groups(model, config.TRAIN.WEIGHT_DECAY, layer_decay=config.MODEL.LAYER_DECAY),
        eps=settings.EPS,
        betas=settings.BETAS,
        momentum=settings.MOMENTUM,
    )


def build_schedule(config: CfgNode, derived: Any) -> Schedule:
    """The schedule with `derived`'s scaled rates and steps (see config.derive)."""
    return Schedule(
        name=config.TRAIN.LR_SCHEDULER.NAME,
        base_lr=derived.base_lr,
        warmup_lr=derived.warmup_lr,
        min_lr=derived.min_lr,
        warmup_steps=derived.warmup_steps,
        total_steps=derived.schedule_steps,
        decay_steps=derived.decay_steps,
        decay_rate=config.TRAIN.LR_SCHEDULER.DECAY_RATE,
    )


def build_ema(config: CfgNode, model: nn.Module, derived: Any) -> ModelEma | None:
    """The average with `derived.ema_decay`, or None where it is off; `model` is not wrapped in DDP."""
    return ModelEma(model, derived.ema_decay, config.EMA.FORCE_CPU) if config.EMA.ENABLED else None


def trains(config: CfgNode) -> bool:
    """Whether main.py is to make training steps, if only to measure them."""
    only_infers = config.EVAL_MODE or config.THROUGHPUT_MODE or config.PROFILE_MODE
    return not only_infers or (config.THROUGHPUT_MODE and config.BENCHMARK.TRAIN)


def compile_setting(config: CfgNode) -> str:
    """The key, or keys, that have what main.py is to do compiled, with values."""
    used = {
        "TRAIN.COMPILE": config.TRAIN.COMPILE if trains(config) else "off",
        "TEST.COMPILE": config.TEST.COMPILE if config.EVAL_MODE or config.THROUGHPUT_MODE else "off",
    }
    return " and ".join(f"{key} {mode}" for key, mode in used.items() if mode != "off")


def describe_out_of_memory(config: CfgNode, error: torch.OutOfMemoryError) -> str:
    """One line with the batch that did not fit on the GPU and what to lower."""
    size = config.DATA.IMG_SIZE
    return out_of_memory_message(
        error,
        work=f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} images of {size}x{size} per process",
        batch_size=config.DATA.BATCH_SIZE,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS if trains(config) else None,
        amp=config.AMP,
        can_recompute=not config.TRAIN.USE_CHECKPOINT,
        smaller="lower DATA.IMG_SIZE",
    )


def build_train_step(
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEma | None,
    precision: Precision,
    derived: Any,
) -> TrainStep:
    """A classifier's training step; `model` is wrapped in DDP where there are several processes."""
    loss = ClassificationLoss(
        model,
        ema.module if ema else None,
        mesa_ratio=config.AUG.MESA,
        mesa_start_step=derived.mesa_start_epoch * derived.steps_per_epoch,
    )
    parts = (model, optimizer, precision)
    options = {"compute_losses": loss, "clip_grad": config.TRAIN.CLIP_GRAD, "ema": ema}
    train_step = TrainStep(*parts, **options)
    device = train_step.found_inf.device
    mode = resolve_mode(config.TRAIN.COMPILE, device)
    compile_regions(model, mode, config.TRAIN.ACTIVATION_BUDGET)
    if ema is not None and loss.teacher is not None:
        compile_regions(ema.module, mode, config.TRAIN.ACTIVATION_BUDGET)
    if mode not in GRAPH_MODES:
        return train_step
    reason = graph_unsupported_reason(train_step, dist.get_world_size() if dist.is_initialized() else 1)
    if reason:
        logger.info("TRAIN.COMPILE %s: the step is not one CUDA graph, %s", config.TRAIN.COMPILE, reason)
        return train_step
    return GraphedTrainStep(*parts, **options)


def build_trainer_config(config: CfgNode, derived: Any, *, metric: str, panels: Sequence[Panel]) -> TrainerConfig:
    """The plan of a run that is judged by `metric`."""
    return TrainerConfig(
        total_epochs=derived.total_epochs,
        steps_per_epoch=derived.steps_per_epoch,
        lr_at=build_schedule(config, derived).lr_at,
        metric=metric,
        panels=panels,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
        save_freq=config.SAVE_FREQ,
        save_steps=config.TRAIN.SAVE_STEPS,
        print_freq=config.PRINT_FREQ,
        stop_on_save_error=config.TRAIN.ON_SAVE_ERROR == "stop",
        save_in_background=config.TRAIN.SAVE_IN_BACKGROUND,
        picture_epochs=config.LOG.PICTURE_EPOCHS,
    )


def build_tracker(config: CfgNode, folder: Path, *, continues: bool) -> WandbLogger | None:
    """The run at Weights & Biases, where LOG.WANDB names a project; on the first process.

    Raises:
        WandbError: it cannot be used as it is set up.
    """
    if not config.LOG.WANDB:
        return None
    return WandbLogger(config.LOG.WANDB, folder, config=dict(flatten(config)), continues=continues)

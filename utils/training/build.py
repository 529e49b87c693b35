"""Build the parts of training from a configuration."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from utils.config.yaml_file import flatten
from utils.distributed.gradient_exchange import GradientExchange, all_reduce_speed, should_overlap
from utils.distributed.process import Process
from utils.logs.logger import logger
from utils.logs.wandb_logger import WandbLogger
from utils.speed.compile import (
    GRAPH_MODES,
    compile_regions,
    resolve_inference_mode,
    resolve_training_mode,
)
from utils.speed.flops import training_flops
from utils.speed.memory import out_of_memory_message
from utils.speed.shape_graphs import ShapeGraphs
from utils.training.amp import Precision, make_precision
from utils.training.derived import Derived
from utils.training.ema import ModelEma
from utils.training.fused_update_support import make_fused_update
from utils.training.graphed_step import (
    GraphedTrainStep,
    SideStreamStep,
    graph_unsupported_reason,
    part_unsupported_reason,
)
from utils.training.inference import InferenceModel
from utils.training.lr_schedule import ClassificationSchedule
from utils.training.optimizer import make_optimizer
from utils.training.task import Schedule, Task
from utils.training.train_step import TrainStep
from utils.training.trainer import TrainerConfig


def build_precision(config: CfgNode, device: torch.device) -> Precision:
    return make_precision(device, amp=config.AMP, dtype=config.AMP_DTYPE)


def build_optimizer(config: CfgNode, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    settings = config.TRAIN.OPTIMIZER
    return make_optimizer(settings.NAME, groups, eps=settings.EPS, betas=settings.BETAS, momentum=settings.MOMENTUM)


def build_ema(config: CfgNode, model: nn.Module, derived: Derived) -> ModelEma | None:
    """Return the EMA of a model, or None if it is off."""
    if not config.EMA.ENABLED:
        return None
    return ModelEma(model, derived.ema_decay, config.EMA.FORCE_CPU, warmup=derived.ema_warmup)


def build_classification_schedule(config: CfgNode, *, steps_per_epoch: int, lr_scale: float) -> ClassificationSchedule:
    train = config.TRAIN
    return ClassificationSchedule(
        name=train.LR_SCHEDULER.NAME,
        base_lr=train.BASE_LR * lr_scale,
        warmup_lr=train.WARMUP_LR * lr_scale,
        min_lr=train.MIN_LR * lr_scale,
        warmup_steps=train.WARMUP_EPOCHS * steps_per_epoch,
        total_steps=train.EPOCHS * steps_per_epoch,
        decay_steps=train.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch,
        decay_rate=train.LR_SCHEDULER.DECAY_RATE,
    )


def trains(config: CfgNode) -> bool:
    """Return whether training steps are run, if only to time them."""
    only_infers = config.EVAL_MODE or config.THROUGHPUT_MODE or config.PROFILE_MODE
    return not only_infers or (config.THROUGHPUT_MODE and (config.BENCHMARK.TRAIN or measures_loading(config)))


def measures_loading(config: CfgNode) -> bool:
    """Return whether training from files is timed, with an evaluation; dense tasks do not have the key."""
    return bool(config.THROUGHPUT_MODE and config.BENCHMARK.get("LOADING"))


def model_uses(config: CfgNode, device: torch.device) -> set[str]:
    """Return what is done with the model, of `KERNELS` in models/kernels/self_test.py."""
    uses = {"training"} if trains(config) else set()
    if trains(config) and config.EMA.ENABLED and config.AUG.get("MESA"):
        uses.add("inference")  # of the teacher
    if not (config.THROUGHPUT_MODE and config.BENCHMARK.TRAIN):
        mode = resolve_inference_mode(config.TEST.COMPILE, device)
        uses.add("inference" if mode == "off" else "prepared")
        if "prepared" in uses and not trains(config) and (config.THROUGHPUT_MODE or config.DATA.BATCH_SIZE <= 2):
            uses.add("one_image")
    return uses


def has_one_training_shape(task: Task, config: CfgNode, device: torch.device) -> bool:
    """Return whether modules compiled for training see one shape: evaluation with TEST.COMPILE off uses them too."""
    inference_mode = resolve_inference_mode(config.TEST.COMPILE, device)
    return task.has_one_image_size and inference_mode != "off"


def compile_setting(config: CfgNode) -> str:
    """Return the compile keys in use with their values, for messages."""
    used = {
        "TRAIN.COMPILE": config.TRAIN.COMPILE if trains(config) else "off",
        "TEST.COMPILE": config.TEST.COMPILE if config.EVAL_MODE or config.THROUGHPUT_MODE else "off",
    }
    return " and ".join(f"{key} {mode}" for key, mode in used.items() if mode != "off")


def describe_out_of_memory(task: Task, config: CfgNode, error: torch.OutOfMemoryError) -> str:
    """Return one line with the work that did not fit into the GPU's memory, and the remedies."""
    work, batch_size = task.memory_request(config)
    return out_of_memory_message(
        error,
        work=work,
        batch_size=batch_size,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS if trains(config) else None,
        amp=config.AMP or config.EVAL_MODE,  # --eval does not use it
        can_checkpoint=not config.TRAIN.USE_CHECKPOINT and not config.MODEL.TYPE.startswith("timm:"),
        smaller=task.smaller_images,
    )


def training_mode(task: Task, config: CfgNode, model: nn.Module, device: torch.device, derived: Derived) -> str:
    """Return the compile mode of a model's training step: the same for all parts of a run that is interrupted."""
    num_images = derived.total_steps * config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = training_flops(num_parameters, task.image_size(config, training=True), num_images)
    auto = task.auto_training_mode
    return resolve_training_mode(config.TRAIN.COMPILE, device, num_steps=derived.total_steps, flops=flops, auto=auto)


def build_train_step(
    task: Task,
    config: CfgNode,
    model: nn.Module,
    process: Process,
    optimizer: torch.optim.Optimizer,
    ema: ModelEma | None,
    precision: Precision,
    derived: Derived,
) -> TrainStep:
    """Return the training step of a model on all processes together, compiled as TRAIN.COMPILE says."""
    exchange = None
    if process.num_processes > 1:
        speed = all_reduce_speed(process.device)
        overlaps = should_overlap(speed)
        exchange = GradientExchange(model, find_unused=config.TRAIN.FIND_UNUSED_PARAMS, overlaps=overlaps)
        if speed is not None:
            place = "beside" if overlaps else "after"
            logger.info("Gradients are exchanged %s the backward pass; all-reduces sum %.0f GB/s", place, speed / 1e9)
    compute_losses = task.losses(config, model, ema, derived)
    parts = (model, optimizer, precision)
    options: dict[str, Any] = {"compute_losses": compute_losses, "clip_grad": config.TRAIN.CLIP_GRAD, "ema": ema}
    options["exchange"] = exchange
    if config.MODEL.KERNELS != "torch":
        options["choose_update"] = partial(
            make_fused_update, optimizer, ema, precision.scaler, is_alone=exchange is None
        )
    train_step = TrainStep(*parts, **options)
    mode = training_mode(task, config, model, process.device, derived)
    teacher = getattr(compute_losses, "teacher", None)
    has_one_shape = has_one_training_shape(task, config, process.device)
    for module in filter(None, (model, teacher)):
        part = module.get_submodule(task.compiled_module)
        compile_regions(part, mode, config.TRAIN.ACTIVATION_BUDGET, has_one_shape=has_one_shape)
    if mode not in GRAPH_MODES:
        return train_step
    has_part = hasattr(compute_losses, "fixed_part")
    reason = part_unsupported_reason(train_step) if has_part else graph_unsupported_reason(train_step)
    if reason:
        logger.info("TRAIN.COMPILE %s: the step has no CUDA graph: %s", config.TRAIN.COMPILE, reason)
        return train_step
    if has_part:
        num_calls = derived.total_steps * config.TRAIN.ACCUMULATION_STEPS
        compute_losses.record_fixed_part(partial(ShapeGraphs, num_calls=num_calls))  # type: ignore[attr-defined]
        return SideStreamStep(*parts, **options)
    return GraphedTrainStep(*parts, **options)


def is_captured(train_step: TrainStep) -> bool:
    """Return whether a step replays CUDA graphs."""
    part = getattr(train_step.compute_losses, "fixed_part", None)
    return isinstance(train_step, GraphedTrainStep) or isinstance(part, ShapeGraphs)


def build_inference_model(
    task: Task, config: CfgNode, device: torch.device, *, for_speed: bool = False
) -> InferenceModel:
    """Return what prepares and compiles models for evaluation, or to measure their speed."""
    mode = resolve_inference_mode(config.TEST.COMPILE, device, for_speed=for_speed)
    return InferenceModel(task, mode, device, build_precision(config, device).dtype)


def build_trainer_config(task: Task, config: CfgNode, derived: Derived, schedule: Schedule) -> TrainerConfig:
    return TrainerConfig(
        total_epochs=derived.total_epochs,
        steps_per_epoch=derived.steps_per_epoch,
        lr_at=schedule.lr_at,
        metric=task.metric,
        metric_label=task.metric_label,
        best_name=task.best_name,
        best_label=task.best_label,
        panels=task.panels,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
        save_freq=config.SAVE_FREQ,
        save_steps=config.TRAIN.SAVE_STEPS,
        print_freq=config.PRINT_FREQ,
        stop_on_save_error=config.TRAIN.ON_SAVE_ERROR == "stop",
        save_in_background=config.TRAIN.SAVE_IN_BACKGROUND,
        image_epochs=config.LOG.PICTURE_EPOCHS,
    )


def build_tracker(config: CfgNode, folder: Path, *, continues: bool) -> WandbLogger | None:
    """Return the logger to Weights & Biases if LOG.WANDB names a project; on the first process.

    Raises:
        WandbError: Weights & Biases cannot be used as it is set up.
    """
    if not config.LOG.WANDB:
        return None
    return WandbLogger(config.LOG.WANDB, folder, config=dict(flatten(config)), continues=continues)

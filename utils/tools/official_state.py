"""The training state of a run as the official code stores it, with which that code continues the run."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch import nn

from utils.checkpoint.files import progress_in
from utils.config.errors import UserError
from utils.training.lr_schedule import ClassificationSchedule

NUM_GROUPS = 2  # with weight decay, and without
IMPLEMENTATION = {"fused": None, "foreach": None, "capturable": False}  # left to the official code's torch


class OfficialStateError(UserError):
    """A training state that the official code cannot continue from."""


def official_state(
    content: Mapping[str, Any], source: str, schedule: ClassificationSchedule, steps_per_epoch: int
) -> dict[str, Any]:
    """Return the entries that an official checkpoint has beside the weights and the configuration.

    Args:
        content: of a checkpoint of this project, checked by `check_run_content`.
        source: its file, for messages.
        schedule: learning rates of the run.
        steps_per_epoch: optimizer steps per epoch.

    Raises:
        OfficialStateError: the checkpoint is from within an epoch, or of other parameter groups than the official ones.
    """
    progress, groups = progress_in(content), content["optimizer"]["param_groups"]
    if progress.steps:
        raise OfficialStateError(
            f"{source}: is from within an epoch, and the official code continues only at the end of one; "
            "name a ckpt_epoch_N.pth, or leave out --training-state"
        )
    if len(groups) != NUM_GROUPS:
        raise OfficialStateError(
            f"{source}: its optimizer has {len(groups)} groups of parameters, as MODEL.LAYER_DECAY makes them, the "
            f"official one has {NUM_GROUPS}; leave out --training-state"
        )
    lr = schedule.lr_at(progress.epochs * steps_per_epoch)
    return {
        "optimizer": {
            "state": content["optimizer"]["state"],
            "param_groups": [official_group(group, lr, schedule.base_lr) for group in groups],
        },
        "lr_scheduler": scheduler_state(schedule),
        "max_accuracy": float(content.get("max_accuracy", 0.0)),
        "max_accuracy_e": float(content.get("max_accuracy_e", 0.0)),
        "epoch": progress.epochs,  # complete epochs; in this project's files it is the index of the last one
    }


def official_group(group: Mapping[str, Any], lr: float, base_lr: float) -> dict[str, Any]:
    """Return a parameter group with the learning rate of the next step and PyTorch's default implementation."""
    return {**group, **{key: IMPLEMENTATION[key] for key in IMPLEMENTATION if key in group}} | {
        "lr": lr,
        "initial_lr": base_lr,
    }


def scheduler_state(schedule: ClassificationSchedule) -> dict[str, Any]:
    """Return the state of timm's scheduler, which the official code uses.

    Its linear scheduler is its own, and keeps what its configuration says where the state is empty.
    """
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(NUM_GROUPS)]
    optimizer = torch.optim.SGD(groups, lr=schedule.base_lr)
    common: dict[str, Any] = {
        "warmup_t": schedule.warmup_steps,
        "warmup_lr_init": schedule.warmup_lr,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if schedule.name == "cosine":
        return CosineLRScheduler(
            optimizer, t_initial=schedule.total_steps, lr_min=schedule.min_lr, cycle_limit=1, **common
        ).state_dict()
    if schedule.name == "step":
        return StepLRScheduler(
            optimizer, decay_t=schedule.decay_steps, decay_rate=schedule.decay_rate, **common
        ).state_dict()
    return {}

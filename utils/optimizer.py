"""Optimizers and their parameter groups."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed, and not. Not decayed are tensors of fewer than two dimensions, names that end in `.bias`,
    and names that the model's `no_weight_decay()` lists.
    """
    list_exempt: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    exempt = list_exempt()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.ndim < 2 or name.endswith(".bias") or name in exempt
            (others if is_exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    eps: float = 1e-8,
    betas: Sequence[float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum; the learning rate is set at each step.

    Fused: one kernel for all tensors, which also leaves everything unchanged where `found_inf` says so, without asking
    the device first.

    Raises:
        ValueError: a name other than adamw and sgd.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, eps=eps, betas=(betas[0], betas[1]), fused=True)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum > 0:
            # Fused SGD leaves them uninitialised where `found_inf` skips the first step.
            for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    raise ValueError(f"optimizer {name!r}: known are adamw and sgd")

"""Optimizers and their parameter groups."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Return the parameter groups of the classification recipe, with and without weight decay.

    Tensors of fewer than two dimensions, names that end in `.bias`, and names that the model's `no_weight_decay()`
    lists are not decayed. Parameters that take no gradient are left out.

    With a layer_decay below 1 there are two groups per layer, each with an `lr_scale`, its factor of the learning
    rate: 1 for the classifier, and layer_decay times the next layer's for the others (timm's helper; the model's
    `group_matcher` defines the layers). Source: BEiT (Bao et al., 2021).
    """
    list_exempt: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    exempt = list_exempt()
    if layer_decay < 1:
        return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    return split_groups(
        model, weight_decay, lambda name, parameter: parameter.ndim < 2 or name.endswith(".bias") or name in exempt
    )


def dense_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of the published detection and segmentation recipes.

    Names with `norm` or `absolute_pos_embed` are not decayed; biases are.
    """
    return split_groups(model, weight_decay, lambda name, _: "norm" in name or "absolute_pos_embed" in name)


def split_groups(
    model: nn.Module, weight_decay: float, is_exempt: Callable[[str, nn.Parameter], bool]
) -> list[dict[str, Any]]:
    """Return two parameter groups: with weight decay, and exempt from it."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (exempt if is_exempt(name, parameter) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def matched_state(
    saved: dict[str, Any], weights: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return a saved optimizer's state in the order of `optimizer`'s parameters, with `optimizer`'s settings.

    Optimizers number their parameters in the model's order, which may differ in other code; the order of the names in
    the weights saved beside the state tells it.

    Args:
        saved: the saved optimizer's state_dict.
        weights: weights by name, in the order of the model that was trained.
        model: the model whose parameters `optimizer` trains.
        optimizer: the optimizer that will load the state, with groups made by the same rule.

    Raises:
        ValueError: groups of other sizes, as other settings give.
        MomentError: a moment is missing, or has another shape than its parameter.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    positions = {name: position for position, name in enumerate(weights)}
    sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"groups of {sizes[0]} parameters where this run has {sizes[1]}")
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    first = 0
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        own = [names[id(parameter)] for parameter in group["params"]]
        saved_ids = dict(zip(sorted(own, key=positions.__getitem__), saved_group["params"], strict=True))
        for i, (name, parameter) in enumerate(zip(own, group["params"], strict=True), start=first):
            entry = saved["state"].get(saved_ids[name])
            if not entry or all(value is None for value in entry.values()):  # never updated
                continue
            moments = {key: moment(entry, key, name, parameter) for key in moment_names(optimizer)}
            if "exp_avg" not in moments:
                state[i] = moments
            elif "step" in entry:  # a plain number before torch 1.12
                state[i] = {"step": torch.as_tensor(entry["step"], dtype=torch.float32).reshape(()), **moments}
            else:
                raise MomentError(f"no step of {name}")
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({**settings, "params": list(range(first, first + len(own)))})
        first += len(own)
    return {"state": state, "param_groups": groups}


class MomentError(ValueError):
    """A saved optimizer lacks a moment of a parameter, or has one of another shape."""


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of what an optimizer of `make_optimizer` keeps per weight."""
    if isinstance(optimizer, torch.optim.AdamW):
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()


def moment(entry: dict[str, Any], key: str, name: str, parameter: Tensor) -> Tensor:
    """Return a saved moment with the parameter's memory layout: fused optimizers read the memory as it lies.

    Raises:
        MomentError: it is missing, or of another shape than the parameter.
    """
    value = entry.get(key)
    if not isinstance(value, Tensor):
        raise MomentError(f"no {key} of {name}")
    if value.shape != parameter.shape or not value.is_floating_point():
        kind = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        raise MomentError(f"{key} of {name} is {kind}, the weight {tuple(parameter.shape)}")
    return torch.empty_like(parameter).copy_(value)


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    eps: float = 1e-8,
    betas: Sequence[float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Return AdamW, or SGD with Nesterov momentum; the learning rate is set at each step.

    Fused: one kernel for all tensors, which also skips the update where `found_inf` is set, without a host
    synchronization.

    Raises:
        ValueError: a name other than adamw and sgd.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, eps=eps, betas=(betas[0], betas[1]), fused=True)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum > 0:
            # Fused SGD leaves momentum buffers uninitialized when `found_inf` skips the first step.
            for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    raise ValueError(f"optimizer {name!r}: known are adamw and sgd")

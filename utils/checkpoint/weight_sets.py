"""The sets of weights in a file's content, under the names that the model gives them: the model's own, and the EMA's.

Known are the files of this project, the official code and timm; torchvision's reference scripts and torch's
AveragedModel; OpenMMLab with mmengine's EMAHook; and Lightning with its WeightAveraging. Wrappers such as DDP and
torch.compile add parts to names, at the front or in the middle, which are removed.
"""

from collections import defaultdict
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]

# Types of numbers that convert into each other without losing a part of the value or its meaning.
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
NUMBERS = FLOATS | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

# Keys of a file's content; each may hold weights, or a dictionary with such keys again.
MODEL_KEYS = ("model", "state_dict", "model_state_dict")
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model")
MAX_DEPTH = 3  # of dictionaries within each other
# Parts of names. A wrapper's part is the only one after what stands before it.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
COUNTERS = ("n_averaged", "steps")  # of an averaged model, beside its `module`: torch's, mmengine's
EMA_ROOTS = {"model_ema", "ema_model", "ema", "averaged_model", "average_model", "_average_model", "swa_model"}
MODEL_ROOTS = {"model", "net", "network"}  # of a Lightning module, where losses and metrics may stand beside it


class WeightSets(NamedTuple):
    """Weights of the model and of its average; None where there are none."""

    model: Weights | None
    ema: Weights | None


NOTHING = WeightSets(None, None)


def find_weight_sets(content: Any, depth: int = MAX_DEPTH) -> WeightSets:
    """Return the weights in a file's content, which may be a bare state_dict, or dictionaries of those.

    Order is kept: optimizers refer to it.
    """
    if not isinstance(content, dict) or not content or not depth:
        return NOTHING
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return split(content)
    by_key = {key: find_weight_sets(content.get(key), depth - 1) for key in (*MODEL_KEYS, *EMA_KEYS)}
    model = next((by_key[key] for key in MODEL_KEYS if by_key[key] != NOTHING), NOTHING)
    ema = next((by_key[key] for key in EMA_KEYS if by_key[key] != NOTHING), NOTHING)
    average = ema.ema or ema.model
    current = find_weight_sets(content.get("current_model_state"), depth - 1).model
    if current is not None and "averaging_state" in content:  # Lightning's state_dict is the average
        return WeightSets(current, model.model)
    if is_swapped(content):
        return WeightSets(average, model.model)
    return WeightSets(model.model, average or model.ema)


def is_swapped(content: dict[str, Any]) -> bool:
    """Return whether mmengine's EMAHook wrote this; then `state_dict` is the average, `ema_state_dict` the model."""
    ema = content.get("ema_state_dict")
    return isinstance(ema, dict) and "steps" in ema and "state_dict" in content


def split(weights: Weights) -> WeightSets:
    """Return the model's weights and the average's in one state_dict."""
    is_average, weights = without_counters(weights)
    weights = without_wrappers(weights)
    roots = {name.partition(".")[0] for name in weights}
    if is_average:
        return WeightSets(None, split(weights).model)
    if averages := roots & EMA_ROOTS:
        averaged = split(below(weights, averages))
        rest = {name: value for name, value in weights.items() if name.partition(".")[0] not in averages}
        return WeightSets(split(rest).model if rest else None, averaged.ema or averaged.model)
    if len(models := roots & MODEL_ROOTS) == 1:
        return split(below(weights, models))
    return WeightSets(weights, None)


def below(weights: Weights, roots: Collection[str]) -> Weights:
    """Return the weights whose names start with one of `roots`, without it."""
    return {name.partition(".")[2]: value for name, value in weights.items() if name.partition(".")[0] in roots}


def without_counters(weights: Weights) -> tuple[bool, Weights]:
    """Return whether the weights are those of an averaged model, and them without its counter."""
    counters = {name for name in COUNTERS if name in weights and weights[name].ndim == 0}
    others = {name: value for name, value in weights.items() if name not in counters}
    is_average = bool(counters) and bool(others) and all(name.startswith("module.") for name in others)
    return (True, others) if is_average else (False, weights)


def without_wrappers(weights: Weights) -> Weights:
    """Return the weights without the parts of their names that wrappers have added."""
    parts = {name: name.split(".") for name in weights}
    following = defaultdict(set)  # what follows each beginning of a name
    for name in weights:
        for i, part in enumerate(parts[name]):
            following[tuple(parts[name][:i])].add(part)
    names = {
        name: ".".join(
            part
            for i, part in enumerate(parts[name])
            if not (part in WRAPPERS and following[tuple(parts[name][:i])] == {part} and i + 1 < len(parts[name]))
        )
        for name in weights
    }
    return {names[name]: value for name, value in weights.items()}


def is_convertible(value: Tensor, own: Tensor) -> bool:
    """Return whether a file's tensor holds numbers that a model's tensor can take: of its type, or floats as floats.

    Whole numbers, such as batch norm's counters, may come from any type of numbers, since tools that halve a file's
    weights halve these too.
    """
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.dtype is own.dtype or value.dtype in (FLOATS if own.dtype in FLOATS else NUMBERS)


def described_type(value: Tensor) -> str:
    """Return a tensor's type of numbers, and its layout or device where these are unusual."""
    unusual = [str(value.layout).removeprefix("torch.")] * (value.layout is not torch.strided)
    return " ".join([str(value.dtype).removeprefix("torch."), *unusual, *(["meta"] if value.is_meta else [])])

"""Samples of a model's weights by its parts, small enough to keep often."""

import numpy as np
import torch
from torch import nn

MAX_PARTS = 12
MAX_VALUES = 10_000  # of a part


def weight_samples(model: nn.Module) -> dict[str, np.ndarray]:
    """Up to MAX_VALUES finite weights of each part that has some, evenly spaced, by the part's name.

    Parts are the model's children; those of a list or a sequence of modules, such as stages, count on their own.
    """
    parts: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        parts |= {f"{name}.{i}": part for i, part in child.named_children()} if is_list else {name: child}
    samples: dict[str, np.ndarray] = {}
    for name, part in parts.items():
        values = sample(part)
        if len(values) and len(samples) < MAX_PARTS:
            samples[name] = values
    return samples


@torch.no_grad()
def sample(part: nn.Module) -> np.ndarray:
    parameters = list(part.parameters())
    stride = -(-sum(parameter.numel() for parameter in parameters) // MAX_VALUES)
    chosen = [parameter.detach().flatten()[::stride].float() for parameter in parameters]
    values = torch.cat(chosen)[:MAX_VALUES].cpu().numpy() if chosen else np.zeros(0, dtype=np.float32)
    return values[np.isfinite(values)]

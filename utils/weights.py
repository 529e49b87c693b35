"""Weights by name: found in a file's content, and put into a model, every one of them."""

from typing import Any

from torch import Tensor, nn

from utils.checkpoint import CheckpointError

MAX_KEYS_SHOWN = 5
DERIVED = "rope.rotations"  # in official files; follows from the image size


def weights_in(content: dict[str, Any], key: str) -> dict[str, Tensor] | None:
    """Weights by name from a file's content: those under `key` ("model" or "state_dict_ema"), or None.

    A bare state_dict counts as "model". Prefixes `module.` are taken off, the official files' rotary tables left out.
    """
    weights = content.get(key)
    if weights is None and key == "model" and content and all(isinstance(v, Tensor) for v in content.values()):
        weights = content
    if weights is None:
        return None
    return {name.removeprefix("module."): v for name, v in weights.items() if not name.endswith(DERIVED)}


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, *, fresh_head: bool = False) -> bool:
    """Copy weights into a model, every one of them.

    Args:
        model: not wrapped in DDP.
        weights: by name.
        source: the file's name, for messages.
        fresh_head: keep the model's own `head` where the weights' has another number of classes.

    Returns:
        Whether `head` was left fresh.

    Raises:
        CheckpointError: names or shapes do not fit; lists the first few.
    """
    own = model.state_dict()
    keep_head = (
        fresh_head and "head.weight" in weights and weights["head.weight"].shape[0] != own["head.weight"].shape[0]
    )
    if keep_head:
        weights = {**weights, "head.weight": own["head.weight"], "head.bias": own["head.bias"]}
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in own]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:MAX_KEYS_SHOWN])
        raise CheckpointError(
            f"{source}: weights of another architecture, {len(problems)} keys do not fit: {shown}"
            f"{'; ...' if len(problems) > MAX_KEYS_SHOWN else ''}; use the --cfg that the weights were trained with"
        )
    model.load_state_dict(weights)
    return keep_head

"""Weights by name: found in a file's content, and put into a model, every one of them."""

from typing import Any

from torch import Tensor, nn

from utils.checkpoint import CheckpointError, load_checkpoint

Weights = dict[str, Tensor]

MAX_KEYS_SHOWN = 5


def read_weights(path: str) -> tuple[Weights | None, Weights | None]:
    """The weights of a file: the model's and the average's, at least one of them.

    Raises:
        CheckpointError: the file cannot be read, or holds neither.
    """
    content = load_checkpoint(path)
    found = weights_in(content, "model"), weights_in(content, "state_dict_ema")
    if found == (None, None):
        raise no_weights_error(path, content)
    return found


def no_weights_error(source: str, content: dict[str, Any]) -> CheckpointError:
    found = ", ".join(map(str, content)) or "nothing"
    return CheckpointError(f"{source}: no weights under 'model' or 'state_dict_ema', nor bare ones; found {found}")


def load_pretrained(model: nn.Module, path: str) -> bool:
    """Start from a file's weights, the average's if there are some; see `load_weights` with fresh_head.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit.
    """
    weights, average = read_weights(path)
    return load_weights(model, average or weights or {}, path, fresh_head=True)


def weights_in(content: dict[str, Any], key: str) -> Weights | None:
    """Weights by name from a file's content: those under `key` ("model" or "state_dict_ema"), or None.

    A bare state_dict counts as "model". Prefixes `module.` are taken off.
    """
    for weights in (content.get(key), content if key == "model" else None):
        if isinstance(weights, dict) and weights and all(map(is_weight, weights.items())):
            return {name.removeprefix("module."): value for name, value in weights.items()}
    return None


def is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def load_weights(model: nn.Module, weights: Weights, source: str, *, fresh_head: bool = False) -> bool:
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
    misshapen = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    fitting = {name: value for name, value in weights.items() if name not in misshapen}
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    problems = [f"{name} is missing" for name in missing if name not in misshapen]
    problems += [f"{name} is not in the model" for name in unexpected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}" for name in misshapen
    ]
    if problems:
        shown = "; ".join(problems[:MAX_KEYS_SHOWN])
        raise CheckpointError(
            f"{source}: weights of another architecture, {len(problems)} keys do not fit: {shown}"
            f"{'; ...' if len(problems) > MAX_KEYS_SHOWN else ''}; use the --cfg that the weights were trained with"
        )
    return keep_head

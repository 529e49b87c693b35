"""ImageNet weights into a backbone: every one but the classifier's, and nothing else left fresh but the maps' norms."""

import re

from torch import nn

from utils.checkpoint import CheckpointError
from utils.logger import logger
from utils.weights import MAX_KEYS_SHOWN, read_weights

CLASSIFIER = re.compile(r"(head|norm|fc|classifier)\.")  # of MLLA and of timm's models
FRESH = re.compile(r"norm[0-3]\.(weight|bias)")


def load_backbone(backbone: nn.Module, path: str) -> None:
    """Start a backbone from a classifier's file, its EMA weights if there are some; say in the log what starts fresh.

    Args:
        backbone: an `MLLABackbone` or `TimmBackbone`.
        path: file of a classifier of the same architecture, ours, the official code's or timm's.

    Raises:
        CheckpointError: the file cannot be read, or any weight but the classifier's and norm0 to norm3 does not fit.
    """
    model_weights, ema_weights = read_weights(path)
    weights = ema_weights or model_weights or {}
    body = getattr(backbone, "body", backbone)
    own = body.state_dict()
    kept = {name: value for name, value in weights.items() if name in own or not CLASSIFIER.match(name)}
    misshapen = [name for name in own if name in kept and kept[name].shape != own[name].shape]
    fitting = {name: value for name, value in kept.items() if name not in misshapen}
    missing, unexpected = body.load_state_dict(fitting, strict=False)
    problems = [f"{name} is missing" for name in missing if name not in misshapen and not FRESH.fullmatch(name)]
    problems += [f"{name} is not in the backbone" for name in unexpected]
    problems += [
        f"{name} has shape {tuple(kept[name].shape)}, the backbone's {tuple(own[name].shape)}" for name in misshapen
    ]
    if problems:
        shown = "; ".join(problems[:MAX_KEYS_SHOWN])
        raise CheckpointError(
            f"MODEL.PRETRAINED {path}: weights of another architecture, {len(problems)} keys do not fit: {shown}"
            f"{'; ...' if len(problems) > MAX_KEYS_SHOWN else ''}; a --pretrained file is an ImageNet classifier of "
            f"the size that --cfg names"
        )
    left = sorted({name.rpartition(".")[0] for name in weights if name not in kept})
    fresh = sorted(name for name, _ in backbone.named_children() if FRESH.match(f"{name}.weight"))
    logger.info(
        "backbone: %s weights from %s; not used: %s; start fresh: %s",
        *("EMA" if ema_weights else "model", path, ", ".join(left) or "none", ", ".join(fresh)),
    )

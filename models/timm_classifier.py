"""Classifiers of timm, to be trained by the same recipe as MLLA."""

import logging
import re
from ast import literal_eval
from copy import deepcopy
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models.timm_interface import FreezableClassifier

logger = logging.getLogger("mlla.models")
UNKNOWN_ARGUMENT = re.compile(r"unexpected keyword argument '(\w+)'")


def create_timm_classifier(
    name: str,
    *,
    num_classes: int,
    img_size: int,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    use_checkpoint: bool = False,
    args: str = "",
) -> nn.Module:
    """Make a classifier of timm with initial weights, which also has `freeze_backbone`.

    Args:
        name: timm's name, such as resnet18.
        num_classes: width of the classifier.
        img_size: side of the images in pixels.
        drop_rate, drop_path_rate: dropout and stochastic depth; what the model does not have is logged and left out.
        use_checkpoint: activation checkpointing.
        args: arguments of the model's own, `key=value` with spaces between, such as "embed_dim=32 depths=[1,1,2]".

    Raises:
        ValueError: timm has no such model or argument, or it does not give one logit per class for such images.
    """
    options: dict[str, Any] = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    weights = timm.get_pretrained_cfg(name)
    if weights is not None and weights.fixed_input_size:
        options["img_size"] = img_size
    options |= parse_args(args)
    try:
        model = create_supported(name, num_classes, options)
        if use_checkpoint:
            model.set_grad_checkpointing()
        logits = deepcopy(model).to("meta").eval()(torch.empty(1, 3, img_size, img_size, device="meta"))
    except Exception as error:  # timm's models raise many kinds
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"timm cannot make it for {img_size}x{img_size} and these settings: {text}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise ValueError("it does not give one logit per class")
    # A class of its own, so that names in the state_dict, isinstance and deepcopy stay as they are.
    model.__class__ = type(type(model).__name__, (FreezableClassifier, type(model)), {})
    return model


def create_supported(name: str, num_classes: int, options: dict[str, Any]) -> Any:
    """Return timm's model; a dropout rate that it has no argument for is left out."""
    while True:
        try:
            return timm.create_model(name, num_classes=num_classes, **options)
        except TypeError as error:
            match = UNKNOWN_ARGUMENT.search(str(error))
            if match is None or match[1] not in ("drop_rate", "drop_path_rate") or match[1] not in options:
                raise
            if options.pop(match[1]):
                logger.info("timm:%s has no %s, MODEL.%s is not used", name, match[1], match[1].upper())


def parse_args(text: str) -> dict[str, Any]:
    """Parse `key=value` with spaces between; what is no Python literal is text.

    Raises:
        ValueError: a word without "=".
    """
    pairs = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{word!r} is not key=value")
        try:
            pairs[key] = literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[key] = value
    return pairs

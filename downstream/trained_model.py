"""Shared by the two predict commands: arguments, and a weights file with its configuration and classes."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.checkpoint.best_weights import add_ema_flag, choose_weights, print_choice
from utils.checkpoint.weights import classes_in, load_weights, no_weights_error
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.config.command_line import Parser


class TrainedModel(NamedTuple):
    """Content of a weights file: the model's or the EMA's weights, configuration, and names of classes if any."""

    weights: dict[str, Tensor]
    config: Any
    classes: list[str] | None


def predict_parser(description: str | None, *, images: str) -> Parser:
    """Return a parser with images, weights, configuration and precision; `images` says what an image may be."""
    parser = Parser(description)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=images)
    parser.add_argument(
        *("--weights", "--resume"), required=True, metavar="FILE", help="checkpoint of a run, or published weights"
    )
    parser.add_argument("--cfg", metavar="FILE", help="YAML file; a run's checkpoint holds its own")
    add_ema_flag(parser)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="settings over the file's"
    )
    return parser


def read_trained_model(
    args: argparse.Namespace, load_config: Callable[..., Any], flags: Mapping[str, Any] | None = None
) -> TrainedModel:
    """Read --weights, with the configuration of --cfg or else the one that the file holds.

    Raises:
        CheckpointError: the file cannot be read, holds no weights, or no configuration where --cfg is not given.
        ConfigError: the configuration is not right.
    """
    content = load_checkpoint(args.weights, tolerant=True)
    weights, description = choose_weights(content, args.weights, ema=args.ema)
    if weights is None:
        raise no_weights_error(args.weights, content)
    print_choice(description and f"{args.weights}: {description}")
    source = args.cfg or content.get("config")
    if not isinstance(source, str):
        raise CheckpointError(f"{args.weights}: holds no configuration; name its YAML file with --cfg")
    return TrainedModel(weights, load_config(source, args.opts, flags), classes_in(content))


def load_trained(model: nn.Module, weights: dict[str, Tensor], path: str) -> tuple[nn.Module, torch.device]:
    """Load weights into a model and put it on the device, a GPU if there is one, in evaluation mode.

    Args:
        path: file of the weights, for the error.

    Raises:
        CheckpointError: the weights do not fit the model.
    """
    load_weights(model, weights, path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device, memory_format=torch.channels_last).eval(), device  # type: ignore[call-overload]

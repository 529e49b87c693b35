"""Shared by the commands that use a trained model, whatever its task: their flags, and opening a weights file."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from downstream.build import build_backbone
from downstream.tasks import TASKS, task_of
from utils.checkpoint.best_weights import add_ema_flag, choose_weights, print_choice
from utils.checkpoint.stored_config import stored_config
from utils.checkpoint.weights import classes_in, load_weights, no_weights_error
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.config.command_line import Parser
from utils.config.errors import UserError

EVAL_FLAGS = {"EVAL_MODE": True, "THROUGHPUT_MODE": False, "PROFILE_MODE": False}


class TrainedModel(NamedTuple):
    """Content of a weights file: the model's or the EMA's weights, configuration, task, and names of classes if any."""

    weights: dict[str, Tensor]
    config: Any
    task: str
    classes: list[str] | None


def add_weights_flags(parser: Parser, *, required: bool = True) -> None:
    """Add the flags of `read_trained_model`, and --force."""
    parser.add_argument(
        *("--weights", "--resume"),
        required=required,
        default="",
        metavar="FILE",
        help="a run's checkpoint or other weights: a path, a URL, or mlla-t, mlla-s, mlla-b",
    )
    parser.add_argument(
        "--cfg", default="", metavar="FILE", help="YAML file or name; by default the configuration in the weights file"
    )
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="settings over the file's"
    )
    add_ema_flag(parser)
    parser.add_argument("--force", action="store_true", help="replace results that exist")


def add_device_flag(parser: Parser) -> None:
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:1; by default a GPU if there is one")


def predict_parser(description: str | None, *, images: str) -> Parser:
    """Return a parser with what the predict commands of dense tasks share; `images` says what an image may be."""
    parser = Parser(description)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help=images)
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), metavar="FOLDER")
    add_weights_flags(parser)
    add_device_flag(parser)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    return parser


def add_data_flag(parser: Parser) -> None:
    parser.add_argument("--data-path", default="", metavar="FOLDER", help="dataset; by default the one of training")


def data_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values by key that --data-path sets."""
    return {"DATA.DATA_PATH": args.data_path} if args.data_path else {}


def open_device(name: str) -> torch.device:
    """Return the device of --device, or by default a GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device.
    """
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(cpu|cuda)(?:(?<=cuda):(\d+))?", name)
    if not match:
        raise UserError(f"--device {name}: must be cpu, cuda or cuda:<number>")
    if match[1] == "cuda" and int(match[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there is no such GPU, torch sees {torch.cuda.device_count()}; leave it out")
    return torch.device(name)


def read_trained_model(
    args: argparse.Namespace, *, task: str = "", flags: Mapping[str, Any] | None = None
) -> TrainedModel:
    """Read --weights, with the configuration of --cfg or else the one that the file holds, and --opts over it.

    Args:
        args: parsed flags of `add_weights_flags`.
        task: a key of TASKS, whose models the command takes; by default the configuration's.
        flags: values by key, over all others.

    Raises:
        CheckpointError: the file cannot be read, holds no weights or another task's, or no configuration where --cfg
            is not given.
        ConfigError: the configuration is not right.
    """
    found, config = load_config(args.cfg, args.opts, task, flags) if args.cfg else (task, None)
    content = load_checkpoint(args.weights, tolerant=True)
    weights, description = choose_weights(content, args.weights, ema=args.ema)
    if weights is None:
        raise no_weights_error(args.weights, content)
    if config is None:
        source = stored_config(content, args.weights)
        if task and (other := task_of(source)) != task:
            raise CheckpointError(f"{args.weights}: holds a model for {other}; use {TASKS[other].predict}")
        found, config = load_config(source, args.opts, task, flags)
    print_choice(description and f"{args.weights}: {description}")
    return TrainedModel(weights, config, found, classes_in(content))


def load_config(source: str, opts: Sequence[str], task: str, flags: Mapping[str, Any] | None) -> tuple[str, Any]:
    """Return the task, by default the one that the configuration is of, and the configuration for evaluation."""
    task = task or task_of(source, opts)
    return task, TASKS[task].load(source, opts, {**EVAL_FLAGS, **(flags or {})})


def load_trained(model: nn.Module, weights: dict[str, Tensor], path: str, device: torch.device) -> nn.Module:
    """Load weights into a model and put it on the device, in evaluation mode.

    Args:
        path: file of the weights, for the error.

    Raises:
        CheckpointError: the weights do not fit the model.
    """
    load_weights(model, weights, path)
    return model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def build_trained_backbone(trained: TrainedModel, source: str) -> nn.Module:
    """Build the backbone of a detector or segmentor from weights of the whole model or of the backbone alone.

    Raises:
        UserError: MODEL.TYPE has no backbone.
        CheckpointError: the weights are a classifier's, or do not fit.
    """
    if trained.config.MODEL.TYPE == "linear_vit":
        raise UserError("MODEL.TYPE linear_vit has no backbone; those of mlla and timm:NAME have one")
    inner = {n.removeprefix("backbone."): v for n, v in trained.weights.items() if n.startswith("backbone.")}
    weights = inner or trained.weights
    if "norm0.weight" not in weights:
        raise CheckpointError(f"{source}: has no backbone with a norm per feature map; name a detector or segmentor")
    backbone = build_backbone(trained.config)
    load_weights(backbone, weights, source)
    return backbone

"""Configuration of segmentation: its keys, those that it shares with other dense tasks, and checks across keys.

Steps are optimizer steps, of 16 images in the published recipe.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from config import MAX_COUNT, MAX_FACTOR, MAX_SIDE, MAX_STEPS, MAX_WIDTH, check_ranges
from downstream.dense_config import _C as DENSE
from downstream.dense_config import check_dense
from downstream.segmentation.data.masked_images import LAYOUTS
from utils.config.schema import (
    BELOW_ONE,
    FRACTION,
    Key,
    Section,
    between,
    frozen_node,
    merge_settings,
    one_of,
    refuse,
)

_C = DENSE.clone()

# Data settings
_C.DATA.DATASET = Key("ade20k", one_of(*LAYOUTS), help="layout of DATA_PATH, see README.md")
_C.DATA.REDUCE_ZERO_LABEL = Key(
    None, type=bool, optional=True, help="ignore label 0, classes start at 1; null: true for ade20k, false for folder"
)
_C.DATA.SCALE = Key([2048, 512], between(32, MAX_SIDE), help="long and short side that images are fitted into, pixels")

# Model settings
_C.MODEL.NUM_CLASSES = Key(
    None, between(1, MAX_COUNT), type=int, optional=True, help="null: as many as the dataset has"
)
_C.MODEL.HEAD = Section()
_C.MODEL.HEAD.CHANNELS = Key(512, between(1, MAX_WIDTH), help="width of the head")
_C.MODEL.HEAD.AUXILIARY_CHANNELS = Key(256, between(0, MAX_WIDTH), help="width of the auxiliary head; 0: none")
_C.MODEL.HEAD.DROPOUT = Key(0.1, BELOW_ONE, help="dropout of whole channels before each classifier")
_C.MODEL.HEAD.SYNC_NORM = Key(True, help="synchronize the heads' batch norm over all processes")

# Training settings
_C.TRAIN.STEPS = Key(160000, between(1, MAX_STEPS), help="steps of the run, warm-up included")
_C.TRAIN.EVAL_STEPS = Key(
    16000, between(1, MAX_STEPS), help="steps between evaluations, which count as epochs; divides STEPS"
)
_C.TRAIN.BASE_LR = 6e-5
_C.TRAIN.WARMUP_STEPS = 1500
_C.TRAIN.WARMUP_FACTOR = 1e-6
_C.TRAIN.WEIGHT_DECAY = 0.01
_C.TRAIN.AUXILIARY_WEIGHT = Key(0.4, between(0, MAX_FACTOR), help="weight of the auxiliary head's loss")
_C.TRAIN.LOSS_AVERAGE = Key(
    "all",
    one_of("all", "labelled"),
    help="pixels that the loss is averaged over: all, ignored ones too, as published; or only those with a label",
)

# Augmentation settings
_C.AUG.RATIO = Key([0.5, 2.0], between(0.05, 20), help="smallest and largest factor of SCALE")
_C.AUG.CROP_SIZE = Key(512, between(32, MAX_SIDE), help="side of the crop, pixels")
_C.AUG.MAX_CATEGORY_SHARE = Key(
    0.75, FRACTION, help="a crop is redrawn if one class covers at least this share; 1: never"
)
_C.AUG.COLOURS = Key(True, help="change brightness, contrast, saturation and hue")

# Testing settings
_C.TEST.MULTI_SCALE = Key(False, help="average over the scales of FACTORS, with horizontal flip")
_C.TEST.FACTORS = Key([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], between(0.05, 20), help="factors of SCALE, for MULTI_SCALE")
_C.TEST.SLIDE = Key(False, help="evaluate in overlapping windows, instead of whole images")
_C.TEST.WINDOW = Key(512, between(32, MAX_SIDE), help="side of a window, pixels")
_C.TEST.STRIDE = Key(341, between(1, MAX_SIDE), help="from one window to the next, pixels; at most WINDOW")
_C.TEST.SAVE_PREDICTIONS = Key(False, help="write predictions of evaluation as palette PNGs and overlays")

SCHEMA: dict[str, Key] = _C.flatten()
OWN = Path(__file__).parent / "cfgs"  # configurations that come with the project
FLAGS = {
    "--multi-scale": "TEST.MULTI_SCALE",
    "--slide": "TEST.SLIDE",
    "--save-predictions": "TEST.SAVE_PREDICTIONS",
}


def load_config(source: str | Path, opts: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> CfgNode:
    """Merge defaults, a YAML file or text, `KEY VALUE ...` pairs and flags; see `config.load_config`.

    Raises:
        ConfigError: a missing file, an unknown key, a wrong type, a value out of range, or values that contradict.
    """
    values = merge_settings(SCHEMA, source, opts, flags, own=OWN)
    check_dense(values, {*opts[::2], *(flags or {})})
    check_ranges(values, "AUG.RATIO")
    check_steps(values)
    if len(values["DATA.SCALE"]) != 2:
        refuse(values, "DATA.SCALE", "must have two values")
    if values["DATA.SCALE"][0] < values["DATA.SCALE"][1]:
        refuse(values, "DATA.SCALE", "must have the long side first")
    for name, factor in (("AUG.RATIO", values["AUG.RATIO"][1]), ("TEST.FACTORS", max(values["TEST.FACTORS"]))):
        if values["DATA.SCALE"][0] * factor > 2 * MAX_SIDE:
            refuse(values, name, f"times DATA.SCALE {values['DATA.SCALE']} must not be above {2 * MAX_SIDE} pixels")
    if not values["MODEL.NAME"]:
        refuse(values, "MODEL.NAME", "must be set: it names the output folder")
    if values["TEST.STRIDE"] > values["TEST.WINDOW"]:
        reason = f"must not be above TEST.WINDOW, {values['TEST.WINDOW']}: pixels would be left out"
        refuse(values, "TEST.STRIDE", reason)
    return frozen_node(values)


def check_steps(values: Mapping[str, Any]) -> None:
    steps = values["TRAIN.STEPS"]
    if steps % values["TRAIN.EVAL_STEPS"]:
        refuse(values, "TRAIN.EVAL_STEPS", f"must divide TRAIN.STEPS, which is {steps}")
    if values["TRAIN.WARMUP_STEPS"] >= steps:
        refuse(values, "TRAIN.WARMUP_STEPS", f"must be below TRAIN.STEPS, which is {steps}")

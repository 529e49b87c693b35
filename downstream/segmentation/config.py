"""Configuration of segmentation: every key with its default, range and meaning; what contradicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from downstream.dense_config import DENSE_KEYS, check_dense
from downstream.segmentation.data.dataset import LAYOUTS
from utils.config.schema import FRACTION, YES_NO, Key, above, at_least, between, frozen_node, merge_settings, one_of


def with_default(name: str, default: Any) -> Key:
    return DENSE_KEYS[name]._replace(default=default)


# Steps are optimizer steps, of 16 images in the published recipe.
SCHEMA: dict[str, Key] = DENSE_KEYS | {
    "DATA.DATASET": Key("ade20k", one_of(*LAYOUTS), "layout of DATA_PATH, see README.md"),
    "DATA.REDUCE_ZERO_LABEL": Key(
        None, YES_NO, "label 0 is ignored, classes start at 1; null: as ade20k has it, not so in folder", bool, True
    ),
    "DATA.SCALE": Key([2048, 512], at_least(32), "long and short side that images are fitted into, pixels"),
    "MODEL.NUM_CLASSES": Key(None, at_least(1), "null: as many as the data set has", int, True),
    "MODEL.HEAD.CHANNELS": Key(512, at_least(1), "width of the head"),
    "MODEL.HEAD.AUXILIARY_CHANNELS": Key(256, at_least(0), "width of the auxiliary head; 0: without it"),
    "MODEL.HEAD.DROPOUT": Key(0.1, FRACTION, "of whole channels before each classifier"),
    "MODEL.HEAD.SYNC_NORM": Key(True, YES_NO, "the heads' batch statistics are of all processes' images"),
    "TRAIN.STEPS": Key(160000, at_least(1), "steps of the run, warm-up included"),
    "TRAIN.EVAL_STEPS": Key(16000, at_least(1), "steps between evaluations, which count as epochs; divides STEPS"),
    "TRAIN.BASE_LR": with_default("TRAIN.BASE_LR", 6e-5),
    "TRAIN.WARMUP_STEPS": with_default("TRAIN.WARMUP_STEPS", 1500),
    "TRAIN.WARMUP_FACTOR": with_default("TRAIN.WARMUP_FACTOR", 1e-6),
    "TRAIN.WEIGHT_DECAY": with_default("TRAIN.WEIGHT_DECAY", 0.01),
    "TRAIN.AUXILIARY_WEIGHT": Key(0.4, at_least(0), "weight of the auxiliary head's loss"),
    "TRAIN.LOSS_AVERAGE": Key(
        "all", one_of("all", "labelled"), "pixels that the loss is averaged over: all, ignored ones too, as published"
    ),
    "AUG.RATIO": Key([0.5, 2.0], above(0), "smallest and largest factor of SCALE"),
    "AUG.CROP_SIZE": Key(512, at_least(32), "side of the crop, pixels"),
    "AUG.MAX_CATEGORY_SHARE": Key(0.75, FRACTION, "a crop of which one class covers as much is drawn anew; 1: never"),
    "AUG.HFLIP": Key(0.5, FRACTION, "probability of a horizontal flip"),
    "AUG.COLOURS": Key(True, YES_NO, "change brightness, contrast, saturation and hue"),
    "TEST.MULTI_SCALE": Key(False, YES_NO, "average over FACTORS and mirror images"),
    "TEST.FACTORS": Key([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], between(0.05, 20), "of SCALE, for MULTI_SCALE"),
    "TEST.SLIDE": Key(False, YES_NO, "cut images into overlapping windows, instead of whole"),
    "TEST.WINDOW": Key(512, at_least(32), "side of a window, pixels"),
    "TEST.STRIDE": Key(341, at_least(1), "from one window to the next, pixels; at most WINDOW"),
    "TEST.SAVE_PREDICTIONS": Key(False, YES_NO, "write predictions of evaluation as palette PNGs and overlays"),
}
SWITCHES = {
    "--multi-scale": ("TEST.MULTI_SCALE", "evaluate at six scales, with flip"),
    "--slide": ("TEST.SLIDE", "evaluate in overlapping windows"),
    "--save-predictions": ("TEST.SAVE_PREDICTIONS", "write predictions as palette PNGs and overlays"),
}


def load_config(path: str | Path, opts: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> CfgNode:
    """A checked, frozen node; see `utils.config.schema.merge_settings`.

    Raises:
        ConfigError: a missing file, an unknown key, a wrong type, a value out of range, or values that contradict.
    """
    values = merge_settings(SCHEMA, path, opts, flags)
    refuse = check_dense(values)
    for name in ("DATA.SCALE", "AUG.RATIO"):
        if len(values[name]) != 2:
            refuse(name, "must have two values")
    if values["DATA.SCALE"][0] < values["DATA.SCALE"][1]:
        refuse("DATA.SCALE", "must have the long side first")
    if values["AUG.RATIO"][0] > values["AUG.RATIO"][1]:
        refuse("AUG.RATIO", "must have the smaller value first")
    if not values["MODEL.NAME"]:
        refuse("MODEL.NAME", "must be set: it names the output folder")
    if values["TRAIN.STEPS"] % values["TRAIN.EVAL_STEPS"]:
        refuse("TRAIN.EVAL_STEPS", f"must divide TRAIN.STEPS, which is {values['TRAIN.STEPS']}")
    if values["TRAIN.WARMUP_STEPS"] >= values["TRAIN.STEPS"]:
        refuse("TRAIN.WARMUP_STEPS", f"must be below TRAIN.STEPS, which is {values['TRAIN.STEPS']}")
    if values["TEST.STRIDE"] > values["TEST.WINDOW"]:
        refuse("TEST.STRIDE", f"must not be above TEST.WINDOW, {values['TEST.WINDOW']}: pixels would be left out")
    return frozen_node(values)

"""Configuration of detection: its keys, those that it shares with other dense tasks, and what contradicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from downstream.dense_config import DENSE_KEYS, check_dense
from utils.config.schema import ANY, FRACTION, YES_NO, Key, Rule, at_least, frozen_node, merge_settings

NOT_EMPTY = Rule("not empty", bool)
SCHEMA: dict[str, Key] = DENSE_KEYS | {
    "DATA.DATA_PATH": Key("", ANY, "folder that the four paths below start from"),
    "DATA.TRAIN_ANNOTATIONS": Key("annotations/instances_train2017.json", NOT_EMPTY, "COCO file to train on"),
    "DATA.TRAIN_IMAGES": Key("train2017", NOT_EMPTY, "folder of its images"),
    "DATA.VAL_ANNOTATIONS": Key("annotations/instances_val2017.json", NOT_EMPTY, "COCO file to evaluate on"),
    "DATA.VAL_IMAGES": Key("val2017", NOT_EMPTY, "folder of the images to evaluate on"),
    "MODEL.NAME": Key("mask_rcnn_mlla_tiny", NOT_EMPTY, "names the output folder"),
    "MODEL.DETECTOR.WIDTH": Key(256, at_least(1), "width of the pyramid's maps"),
    "MODEL.DETECTOR.HIDDEN": Key(1024, at_least(1), "width of the box head"),
    "MODEL.DETECTOR.RPN_SAMPLES": Key(256, at_least(2), "anchors of an image that the losses see"),
    "MODEL.DETECTOR.ROI_SAMPLES": Key(512, at_least(4), "proposals of an image that the losses see"),
    "MODEL.DETECTOR.MAX_PROPOSALS": Key(1000, at_least(1), "proposals of an image that the heads look at"),
    "TRAIN.EPOCHS": Key(12, at_least(1), "epochs of training"),
    "TRAIN.DECAY_EPOCHS": Key([8, 11], at_least(1), "epochs after which the learning rate falls"),
    "TRAIN.DECAY_RATE": Key(0.1, FRACTION, "factor of each fall"),
    "AUG.SHORT_SIDES": Key(
        [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], at_least(32), "one is drawn for a resize, pixels"
    ),
    "AUG.LONG_SIDE": Key(1333, at_least(32), "no training image's long side gets longer, pixels"),
    "AUG.HFLIP": Key(0.5, FRACTION, "probability of a horizontal flip"),
    "AUG.CROP": Key(0.5, FRACTION, "probability of a resize and a crop before the resize"),
    "AUG.CROP_SHORT_SIDES": Key([400, 500, 600], at_least(32), "one is drawn for the resize before a crop, pixels"),
    "AUG.CROP_SIZE": Key([384, 600], at_least(32), "smallest and largest side of a crop, pixels"),
    "TEST.SHORT_SIDE": Key(800, at_least(32), "short side of images in evaluation, pixels"),
    "TEST.LONG_SIDE": Key(1333, at_least(32), "long side at most, pixels"),
    "TEST.PER_CLASS": Key(False, YES_NO, "also figures of each category"),
}


def load_config(path: str | Path, opts: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> CfgNode:
    """Merge defaults, a YAML file with its BASE files, `KEY VALUE ...` pairs and flags into a checked, frozen node.

    Raises:
        ConfigError: a missing file, an unknown key, a wrong type, a value out of range, or values that contradict.
    """
    values = merge_settings(SCHEMA, path, opts, flags)
    refuse = check_dense(values)
    if len(values["AUG.CROP_SIZE"]) != 2 or values["AUG.CROP_SIZE"][0] > values["AUG.CROP_SIZE"][1]:
        refuse("AUG.CROP_SIZE", "must have two values, the smaller one first")
    if max(values["AUG.SHORT_SIDES"]) > values["AUG.LONG_SIDE"]:
        refuse("AUG.LONG_SIDE", f"must not be below the short sides, up to {max(values['AUG.SHORT_SIDES'])}")
    if values["TEST.SHORT_SIDE"] > values["TEST.LONG_SIDE"]:
        refuse("TEST.LONG_SIDE", f"must not be below TEST.SHORT_SIDE, which is {values['TEST.SHORT_SIDE']}")
    return frozen_node(values)

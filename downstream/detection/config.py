"""Configuration of detection: its keys, those that it shares with other dense tasks, and checks across keys."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from config import MAX_COUNT, MAX_SIDE, MAX_WIDTH, check_ranges
from downstream.dense_config import _C as DENSE
from downstream.dense_config import check_dense
from utils.config.schema import FRACTION, NOT_EMPTY, Key, Section, between, frozen_node, merge_settings, refuse

_C = DENSE.clone()

# Data settings
_C.DATA.DATA_PATH = Key("", help="folder that the paths of annotations and images start from")
_C.DATA.TRAIN_ANNOTATIONS = Key("annotations/instances_train2017.json", NOT_EMPTY, help="COCO file to train on")
_C.DATA.TRAIN_IMAGES = Key("train2017", NOT_EMPTY, help="folder of the images to train on")
_C.DATA.VAL_ANNOTATIONS = Key("annotations/instances_val2017.json", NOT_EMPTY, help="COCO file to evaluate on")
_C.DATA.VAL_IMAGES = Key("val2017", NOT_EMPTY, help="folder of the images to evaluate on")

# Model settings
_C.MODEL.NAME = "mask_rcnn_mlla_tiny"
_C.MODEL.DETECTOR = Section()
_C.MODEL.DETECTOR.WIDTH = Key(256, between(1, MAX_WIDTH), help="width of the pyramid's maps")
_C.MODEL.DETECTOR.HIDDEN = Key(1024, between(1, MAX_WIDTH), help="width of the box head")
_C.MODEL.DETECTOR.RPN_SAMPLES = Key(256, between(2, MAX_COUNT), help="anchors per image that the losses see")
_C.MODEL.DETECTOR.ROI_SAMPLES = Key(512, between(4, MAX_COUNT), help="proposals per image that the losses see")
_C.MODEL.DETECTOR.MAX_PROPOSALS = Key(1000, between(1, MAX_COUNT), help="maximum proposals per image for the heads")

# Training settings
_C.TRAIN.EPOCHS = Key(12, between(1, MAX_COUNT), help="epochs of training")
_C.TRAIN.DECAY_EPOCHS = Key([8, 11], between(1, MAX_COUNT), help="epochs after which the learning rate decays")
_C.TRAIN.DECAY_RATE = Key(0.1, FRACTION, help="factor of each decay")

# Augmentation settings
_C.AUG.SHORT_SIDES = Key(
    [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    between(32, MAX_SIDE),
    help="short sides, pixels; one is drawn for each image",
)
_C.AUG.LONG_SIDE = Key(1333, between(32, MAX_SIDE), help="maximum long side of training images, pixels")
_C.AUG.CROP = Key(0.5, FRACTION, help="probability of a resize and a crop before the resize")
_C.AUG.CROP_SHORT_SIDES = Key(
    [400, 500, 600], between(32, MAX_SIDE), help="short sides for the resize before a crop, pixels; one is drawn"
)
_C.AUG.CROP_SIZE = Key([384, 600], between(32, MAX_SIDE), help="smallest and largest side of a crop, pixels")

# Testing settings
_C.TEST.SHORT_SIDE = Key(800, between(32, MAX_SIDE), help="short side of images in evaluation, pixels")
_C.TEST.LONG_SIDE = Key(1333, between(32, MAX_SIDE), help="maximum long side of images in evaluation, pixels")
_C.TEST.PER_CLASS = Key(False, help="also report metrics per category")

SCHEMA: dict[str, Key] = _C.flatten()
OWN = Path(__file__).parent / "cfgs"  # configurations that come with the project


def load_config(source: str | Path, opts: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> CfgNode:
    """Merge defaults, a YAML file or text, `KEY VALUE ...` pairs and flags; see `config.load_config`.

    Raises:
        ConfigError: a missing file, an unknown key, a wrong type, a value out of range, or values that contradict.
    """
    values = merge_settings(SCHEMA, source, opts, flags, own=OWN)
    check_dense(values, {*opts[::2], *(flags or {})})
    check_ranges(values, "AUG.CROP_SIZE")
    if max(values["AUG.SHORT_SIDES"]) > values["AUG.LONG_SIDE"]:
        reason = f"must not be below the short sides, up to {max(values['AUG.SHORT_SIDES'])}"
        refuse(values, "AUG.LONG_SIDE", reason)
    if values["TEST.SHORT_SIDE"] > values["TEST.LONG_SIDE"]:
        refuse(values, "TEST.LONG_SIDE", f"must not be below TEST.SHORT_SIDE, which is {values['TEST.SHORT_SIDE']}")
    return frozen_node(values)

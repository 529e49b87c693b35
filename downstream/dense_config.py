"""Configuration keys that the dense tasks share; each task's config.py clones the tree and adds its own."""

from collections.abc import Mapping, Set
from typing import Any

from config import _C as CLASSIFICATION
from config import (
    MAX_FACTOR,
    MAX_STEPS,
    check_channels,
    check_flags_of_modes,
    check_modes,
    check_optimizer,
    check_stages,
)
from utils.config.schema import FRACTION, Key, Rule, above, between, refuse

BACKBONE = Rule("mlla or timm:NAME", lambda value: value == "mlla" or value.startswith("timm:"))

# Keys and sections taken over from classification, with default, rule and meaning
_C = CLASSIFICATION.subset(
    "BASE",
    "DATA.BATCH_SIZE",
    "DATA.DATA_PATH",
    "DATA.PIN_MEMORY",
    "DATA.NUM_WORKERS",
    "MODEL.TYPE",
    "MODEL.NAME",
    "MODEL.RESUME",
    "MODEL.PRETRAINED",
    "MODEL.DROP_RATE",
    "MODEL.DROP_PATH_RATE",
    "MODEL.KERNELS",
    "MODEL.MLLA",
    "TRAIN.WEIGHT_DECAY",
    "TRAIN.BASE_LR",
    "TRAIN.CLIP_GRAD",
    "TRAIN.AUTO_RESUME",
    "TRAIN.SAVE_STEPS",
    "TRAIN.ON_SAVE_ERROR",
    "TRAIN.SAVE_IN_BACKGROUND",
    "TRAIN.ACCUMULATION_STEPS",
    "TRAIN.USE_CHECKPOINT",
    "TRAIN.COMPILE",
    "TRAIN.ACTIVATION_BUDGET",
    "TRAIN.START_EPOCH",
    "TRAIN.DETERMINISTIC",
    "TRAIN.FIND_UNUSED_PARAMS",
    "TRAIN.OPTIMIZER",
    "EMA",
    "AUG.HFLIP",
    "TEST.COMPILE",
    "AMP",
    "AMP_DTYPE",
    "OUTPUT",
    "TAG",
    "SAVE_FREQ",
    "PRINT_FREQ",
    "LOG",
    "SEED",
    "EVAL_MODE",
    "EVAL_EMA",
    "THROUGHPUT_MODE",
    "BENCHMARK.TRAIN",
    "BENCHMARK.BASELINES",
    "PROFILE_MODE",
    "LOCAL_RANK",
)

# Data settings
_C.DATA.BATCH_SIZE = 2
_C.DATA.DATA_PATH = Key("", help="dataset folder")
_C.DATA.NUM_WORKERS = 4

# Model settings
_C.MODEL.TYPE = Key("mlla", BACKBONE, help="backbone: MODEL.MLLA, or a pyramid of timm such as timm:convnext_tiny")
_C.MODEL.NAME = ""
_C.MODEL.MLLA.EMBED_DIM = 64  # MLLA-T's sizes
_C.MODEL.MLLA.DEPTHS = [2, 4, 8, 4]
_C.MODEL.MLLA.NUM_HEADS = [2, 4, 8, 16]
_C.MODEL.RESUME = Key("", help="checkpoint to resume from, or weights to evaluate: path or URL")
_C.MODEL.PRETRAINED = Key("", help="weights of an ImageNet classifier for the backbone: path, URL or mlla-t, -s, -b")

# Training settings
_C.TRAIN.BASE_LR = Key(1e-4, above(0, MAX_FACTOR), help="learning rate after warm-up, for a global batch size of 16")
_C.TRAIN.WARMUP_STEPS = Key(500, between(0, MAX_STEPS), help="steps of linear warm-up")
_C.TRAIN.WARMUP_FACTOR = Key(0.001, FRACTION, help="share of the learning rate that warm-up starts from")
_C.TRAIN.WEIGHT_DECAY = Key(0.05, between(0, MAX_FACTOR), help="except on names with norm or absolute_pos_embed")
_C.TRAIN.CLIP_GRAD = 0.0
_C.EMA.ENABLED = False
_C.EMA.DECAY = Key(0.9998, FRACTION, help="EMA decay per 16 images; a step uses DECAY ^ (global batch size / 16)")
_C.EMA.FORCE_CPU = Key(False, help="keep the EMA on the CPU")
_C.PRINT_FREQ = 10


def check_dense(values: Mapping[str, Any], typed: Set[str]) -> None:
    """Raise ConfigError where shared settings contradict each other; `typed` are the keys of --opts and flags."""
    check_modes(values)
    check_flags_of_modes(values, typed)
    check_optimizer(values)
    if len(values["MODEL.MLLA.DEPTHS"]) != 4:
        refuse(values, "MODEL.MLLA.DEPTHS", "dense tasks take four maps: must have four values")
    check_stages(values, "MODEL.MLLA")
    check_channels(values, "MODEL.MLLA")
    if values["MODEL.TYPE"] != "mlla" and values["TRAIN.USE_CHECKPOINT"]:
        reason = "only MLLA has activation checkpointing; set it to False with a timm backbone"
        refuse(values, "TRAIN.USE_CHECKPOINT", reason)

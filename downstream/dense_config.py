"""Configuration keys that the dense tasks share; each task's config.py adds its own and fixes its defaults."""

from collections.abc import Callable, Mapping
from typing import Any

from config import SCHEMA
from utils.config.schema import ANY, FRACTION, YES_NO, ConfigError, Key, Rule, above, at_least, one_of

REFERENCE_BATCH_SIZE = 16  # that published learning rates are for: 2 on each of 8 GPUs
BACKBONE = Rule("mlla or timm:NAME", lambda value: value == "mlla" or value.startswith("timm:"))
TAKEN_OVER = (  # from classification, default, rule and meaning
    *("BASE", "DATA.PIN_MEMORY", "MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "MODEL.KERNELS"),
    *("MODEL.MLLA.PATCH_SIZE", "MODEL.MLLA.IN_CHANS", "MODEL.MLLA.EMBED_DIM", "MODEL.MLLA.DEPTHS"),
    *("MODEL.MLLA.NUM_HEADS", "MODEL.MLLA.MLP_RATIO", "MODEL.MLLA.QKV_BIAS", "MODEL.MLLA.APE"),
    *("TRAIN.AUTO_RESUME", "TRAIN.ACCUMULATION_STEPS", "TRAIN.USE_CHECKPOINT", "TRAIN.FIND_UNUSED_PARAMS"),
    *("TRAIN.OPTIMIZER.NAME", "TRAIN.OPTIMIZER.EPS", "TRAIN.OPTIMIZER.BETAS", "TRAIN.OPTIMIZER.MOMENTUM"),
    *("TRAIN.SAVE_STEPS", "TRAIN.ON_SAVE_ERROR", "TRAIN.SAVE_IN_BACKGROUND"),
    *("AMP", "AMP_DTYPE", "OUTPUT", "TAG", "SAVE_FREQ", "PRINT_FREQ", "SEED"),
    *("LOG.PICTURE_EPOCHS", "LOG.WANDB", "EVAL_MODE", "PROFILE_MODE", "LOCAL_RANK"),
)
DENSE_KEYS: dict[str, Key] = {name: SCHEMA[name] for name in TAKEN_OVER} | {
    "DATA.BATCH_SIZE": Key(2, at_least(1), "images per process and forward pass"),
    "DATA.DATA_PATH": Key("", ANY, "folder of the data set"),
    "DATA.NUM_WORKERS": Key(4, at_least(0), "loader processes per training process; 0 loads in the training process"),
    "MODEL.TYPE": Key("mlla", BACKBONE, "backbone: MODEL.MLLA.*, or a pyramid of timm such as timm:convnext_tiny"),
    "MODEL.NAME": Key("", Rule("not empty", bool), "names the output folder"),
    "MODEL.RESUME": Key("", ANY, "checkpoint to go on from, or weights to evaluate"),
    "MODEL.PRETRAINED": Key("", ANY, "ImageNet classifier whose weights the backbone takes"),
    "TRAIN.BASE_LR": Key(1e-4, above(0), "learning rate after warm-up, per 16 images a step"),
    "TRAIN.WARMUP_STEPS": Key(500, at_least(0), "steps of linear warm-up"),
    "TRAIN.WARMUP_FACTOR": Key(0.001, FRACTION, "share of the learning rate that warm-up starts from"),
    "TRAIN.COMPILE": Key("off", one_of("off", "default"), "torch.compile of the backbone's blocks, for any image size"),
    "TRAIN.WEIGHT_DECAY": Key(0.05, at_least(0), "but on names with norm or absolute_pos_embed"),
    "TRAIN.CLIP_GRAD": Key(0.0, at_least(0), "largest L2 norm of all gradients together; 0: no clipping"),
    "EMA.ENABLED": Key(False, YES_NO, "keep an exponential moving average of the weights"),
    "EMA.DECAY": Key(0.9998, FRACTION, "per 16 images; a step uses DECAY ^ (images a step / 16)"),
    "EMA.FORCE_CPU": Key(False, YES_NO, "keep the average on the CPU"),
}


def check_dense(values: Mapping[str, Any]) -> Callable[[str, str], None]:
    """Raise ConfigError where shared values contradict each other. Returns what raises it for a key and a reason."""

    def refuse(name: str, reason: str) -> None:
        raise ConfigError(f"{name} {values[name]!r}: {reason}")

    if len(values["TRAIN.OPTIMIZER.BETAS"]) != 2:
        refuse("TRAIN.OPTIMIZER.BETAS", "must have two values")
    if len(values["MODEL.MLLA.DEPTHS"]) != 4:
        refuse("MODEL.MLLA.DEPTHS", "dense tasks take four maps: must have four values")
    if len(values["MODEL.MLLA.NUM_HEADS"]) != 4:
        refuse("MODEL.MLLA.NUM_HEADS", f"must be as many as MODEL.MLLA.DEPTHS, {values['MODEL.MLLA.DEPTHS']}")
    for stage, heads in enumerate(values["MODEL.MLLA.NUM_HEADS"]):
        if (width := values["MODEL.MLLA.EMBED_DIM"] * 2**stage) % heads or width % 4:
            refuse("MODEL.MLLA.NUM_HEADS", f"stage {stage} is {width} wide: its {heads} heads and 4 must divide that")
    if values["MODEL.MLLA.IN_CHANS"] != 3:
        refuse("MODEL.MLLA.IN_CHANS", "images are read as RGB: must be 3")
    if values["MODEL.TYPE"] != "mlla" and values["TRAIN.USE_CHECKPOINT"]:
        refuse("TRAIN.USE_CHECKPOINT", "only MLLA recomputes its blocks; set it to False with a timm backbone")
    return refuse

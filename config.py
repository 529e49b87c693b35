"""Configuration: every key with its default, range and meaning; what contradicts; what follows from it.

Later wins: defaults, the files under BASE, the file itself, --opts, flags that were typed. The result is frozen.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from utils.config.schema import (
    ANY,
    BELOW_ONE,
    FRACTION,
    YES_NO,
    ConfigError,
    Key,
    Rule,
    above,
    at_least,
    between,
    frozen_node,
    merge_settings,
    one_of,
)

COMPILE_MODE = one_of("auto", "off", "default", "reduce-overhead", "max-autotune")
DATASET = Rule(
    "imagenet, folder, digits, hfds/<folder or name> or wds/<folder>",
    lambda value: value in ("imagenet", "folder", "digits") or value.startswith(("hfds/", "wds/")),
)
POLICY = Rule(
    "none, rand-..., augmix-..., original, v0 or 3a",
    lambda value: value.split("-")[0] in ("none", "rand", "augmix", "original", "originalr", "v0", "v0r", "3a"),
)
BASELINES = Rule(
    "timm:NAME, with commas between several",
    lambda value: all(name.startswith("timm:") for name in value.split(",") if value),
)
SIZES = Rule(
    "whole numbers of at least 8, with commas between",
    lambda value: not value or all(size.isdecimal() and int(size) >= 8 for size in value.split(",")),
)
ABOVE_0_TO_1 = Rule("above 0, at most 1", lambda value: 0 < value <= 1)

# The official keys with their defaults, and ours. Steps are optimizer steps; learning rates are for 512 images a step.
SCHEMA: dict[str, Key] = {
    "BASE": Key([""], ANY, "files to start from, relative to this one"),
    "DATA.BATCH_SIZE": Key(128, at_least(1), "images per process and forward pass"),
    "DATA.DATA_PATH": Key("", ANY, "folder with train/ and val/, a folder per class in each"),
    "DATA.DATASET": Key("imagenet", DATASET, "imagenet and folder read DATA_PATH; data/README.md has the rest"),
    "DATA.ON_ERROR": Key("raise", one_of("raise", "skip"), "at an image that cannot be used: stop, or leave it out"),
    "DATA.MAX_BAD": Key(100, at_least(0), "images that skip leaves out at most, per process"),
    "DATA.EXACT_EVAL": Key(True, YES_NO, "evaluate on Pillow's pixels, as published figures are; false is faster"),
    "DATA.CLASSES": Key(None, ANY, "null: all; of the digits only these, ['0', '1'] say", str, True, True),
    "DATA.IMG_SIZE": Key(224, at_least(8), "side of the images, pixels"),
    "DATA.INTERPOLATION": Key("bicubic", one_of("bicubic", "bilinear", "random"), "resizing filter"),
    "DATA.ZIP_MODE": Key(False, YES_NO, "read train.zip and val.zip with their maps, rather than folders"),
    "DATA.CACHE_MODE": Key(
        "part", one_of("no", "part", "full"), "of zip archives in memory: each process's share, or all"
    ),
    "DATA.PIN_MEMORY": Key(True, YES_NO, "page-locked batches, for faster copies to a GPU"),
    "DATA.NUM_WORKERS": Key(8, at_least(0), "loader processes per training process; 0 loads in the training process"),
    "MODEL.TYPE": Key("mlla", one_of("mlla", "linear_vit"), "model family; each reads the section of its name"),
    "MODEL.NAME": Key("mlla_tiny", Rule("not empty", bool), "names the output folder"),
    "MODEL.RESUME": Key("", ANY, "checkpoint to go on from, or weights to evaluate: path, URL or mlla-t, -s, -b"),
    "MODEL.PRETRAINED": Key("", ANY, "weights to start from, likewise; a classifier of other width starts fresh"),
    "MODEL.NUM_CLASSES": Key(None, at_least(1), "null: as many as the data set has, 1000 without one", int, True),
    "MODEL.DROP_RATE": Key(0.0, FRACTION, "dropout after the stem and in the MLPs"),
    "MODEL.DROP_PATH_RATE": Key(0.1, FRACTION, "stochastic depth of the last block, rising linearly from 0"),
    "MODEL.LABEL_SMOOTHING": Key(0.1, FRACTION, "share of the label spread over all classes"),
    "MODEL.KERNELS": Key(
        "auto", one_of("auto", "triton", "torch"), "Triton kernels: where they can run, always, never"
    ),
    "MODEL.LAYER_DECAY": Key(1.0, ABOVE_0_TO_1, "each block's learning rate over that of the next one; 1: all alike"),
    "MODEL.MLLA.PATCH_SIZE": Key(4, one_of(4), "stride of the stem"),
    "MODEL.MLLA.IN_CHANS": Key(3, at_least(1), "channels of an image"),
    "MODEL.MLLA.EMBED_DIM": Key(64, at_least(4), "token width of the first stage; it doubles with each stage"),
    "MODEL.MLLA.DEPTHS": Key([2, 4, 8, 4], at_least(1), "blocks of each stage"),
    "MODEL.MLLA.NUM_HEADS": Key([2, 4, 8, 16], at_least(1), "heads of each stage; must divide its width"),
    "MODEL.MLLA.MLP_RATIO": Key(4.0, above(0), "hidden width of the MLP over its input width"),
    "MODEL.MLLA.QKV_BIAS": Key(True, YES_NO, "bias in the projection to q and k"),
    "MODEL.MLLA.APE": Key(False, YES_NO, "add a learned absolute position embedding"),
    "MODEL.LINEAR_VIT.PATCH_SIZE": Key(4, at_least(1), "side of a patch, pixels"),
    "MODEL.LINEAR_VIT.IN_CHANS": Key(3, at_least(1), "channels of linear_vit's images"),
    "MODEL.LINEAR_VIT.EMBED_DIM": Key(96, at_least(4), "token width of linear_vit's first stage; doubles with each"),
    "MODEL.LINEAR_VIT.DEPTHS": Key([2, 2, 6, 2], at_least(1), "blocks of each stage of linear_vit"),
    "MODEL.LINEAR_VIT.NUM_HEADS": Key([3, 6, 12, 24], at_least(1), "heads of each stage of linear_vit"),
    "MODEL.LINEAR_VIT.MLP_RATIO": Key(4.0, above(0), "hidden width of linear_vit's MLP over its input width"),
    "MODEL.LINEAR_VIT.QKV_BIAS": Key(True, YES_NO, "bias in the projections to q, k and v"),
    "MODEL.LINEAR_VIT.INPUT_GATE": Key(False, YES_NO, "multiply V by softplus(x W1 W2 + b)"),
    "MODEL.LINEAR_VIT.FORGET_GATE": Key(False, YES_NO, "let the state decay; tokens are read in raster order"),
    "MODEL.LINEAR_VIT.SHORTCUT": Key(False, YES_NO, "add D * V, D a learned vector"),
    "MODEL.LINEAR_VIT.NORMALISE": Key(True, YES_NO, "divide by Q Z"),
    "MODEL.LINEAR_VIT.SINGLE_HEAD": Key(
        False, YES_NO, "one head of Q and K, as wide as one of NUM_HEADS, for all of V"
    ),
    "MODEL.LINEAR_VIT.BLOCK": Key(
        "transformer", one_of("transformer", "sub", "all"), "what Mamba's gated block replaces: nothing, attention, all"
    ),
    "MODEL.LINEAR_VIT.APE": Key(False, YES_NO, "add learned absolute position embeddings, one in each block"),
    "MODEL.LINEAR_VIT.LEPE": Key(False, YES_NO, "add a depthwise convolution of V after attention"),
    "MODEL.LINEAR_VIT.CPE": Key(False, YES_NO, "add depthwise convolutions before attention and before the MLP"),
    "MODEL.LINEAR_VIT.ROPE": Key(False, YES_NO, "rotate Q and K by their tokens' rows and columns"),
    "TRAIN.START_EPOCH": Key(0, at_least(0), "first epoch where no checkpoint says it"),
    "TRAIN.EPOCHS": Key(300, at_least(1), "epochs of the schedule, warm-up included"),
    "TRAIN.WARMUP_EPOCHS": Key(20, at_least(0), "epochs of linear warm-up; below EPOCHS"),
    "TRAIN.COOLDOWN_EPOCHS": Key(0, at_least(0), "epochs after the schedule, at its last rate"),
    "TRAIN.WEIGHT_DECAY": Key(0.05, at_least(0), "on tensors of two or more dimensions"),
    "TRAIN.BASE_LR": Key(5e-4, above(0), "learning rate after warm-up, per 512 images a step"),
    "TRAIN.WARMUP_LR": Key(5e-7, at_least(0), "learning rate of the first step, per 512 images"),
    "TRAIN.MIN_LR": Key(5e-6, at_least(0), "learning rate at the end of cosine, per 512 images"),
    "TRAIN.CLIP_GRAD": Key(5.0, at_least(0), "largest L2 norm of all gradients together; 0: no clipping"),
    "TRAIN.AUTO_RESUME": Key(True, YES_NO, "go on from the newest whole checkpoint in the output folder"),
    "TRAIN.SAVE_STEPS": Key(0, at_least(0), "steps between checkpoints within epochs; 0: only at their ends"),
    "TRAIN.ON_SAVE_ERROR": Key("continue", one_of("continue", "stop"), "what to do where a checkpoint cannot be saved"),
    "TRAIN.SAVE_IN_BACKGROUND": Key(True, YES_NO, "train on while a checkpoint is brought to the disk"),
    "TRAIN.ACCUMULATION_STEPS": Key(1, at_least(1), "forward passes per step"),
    "TRAIN.FREEZE": Key(False, YES_NO, "train the classifier alone; all else keeps its weights and statistics"),
    "TRAIN.USE_CHECKPOINT": Key(False, YES_NO, "recompute blocks in the backward pass to save memory"),
    "TRAIN.COMPILE": Key(
        "off", COMPILE_MODE, "torch.compile of blocks, from reduce-overhead on the step as a CUDA graph"
    ),
    "TRAIN.ACTIVATION_BUDGET": Key(
        1.0,
        between(0, 1),
        "share of activations that compiled blocks keep for the backward pass; the rest is recomputed",
    ),
    "TRAIN.FIND_UNUSED_PARAMS": Key(False, YES_NO, "let DDP look for parameters without gradient"),
    "TRAIN.LR_SCHEDULER.NAME": Key("cosine", one_of("cosine", "linear", "step"), "shape after warm-up"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key(30, at_least(1), "epochs between decays of step"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key(0.1, FRACTION, "factor of each decay of step"),
    "TRAIN.OPTIMIZER.NAME": Key("adamw", one_of("adamw", "sgd"), "sgd is with Nesterov momentum"),
    "TRAIN.OPTIMIZER.EPS": Key(1e-8, above(0), "AdamW's epsilon"),
    "TRAIN.OPTIMIZER.BETAS": Key([0.9, 0.999], BELOW_ONE, "AdamW's two decay rates"),
    "TRAIN.OPTIMIZER.MOMENTUM": Key(0.9, FRACTION, "SGD's momentum"),
    "EMA.ENABLED": Key(True, YES_NO, "keep an exponential moving average of the weights"),
    "EMA.DECAY": Key(0.9996, FRACTION, "per 4096 images; a step uses DECAY ^ (images a step / 4096)"),
    "EMA.FORCE_CPU": Key(False, YES_NO, "keep the average on the CPU; not with AUG.MESA"),
    "AUG.COLOR_JITTER": Key(0.4, at_least(0), "only where AUTO_AUGMENT is none"),
    "AUG.AUTO_AUGMENT": Key("rand-m9-mstd0.5-inc1", POLICY, "timm's augmentation policy"),
    "AUG.HFLIP": Key(0.5, FRACTION, "probability of a horizontal flip"),
    "AUG.SCALE": Key([0.08, 1.0], between(0, 1), "area of the random crop, smallest and largest share"),
    "AUG.RATIO": Key([0.75, 4 / 3], above(0), "width over height of the random crop, smallest and largest"),
    "AUG.REPROB": Key(0.25, FRACTION, "probability of random erasing"),
    "AUG.REMODE": Key("pixel", one_of("pixel", "rand", "const"), "filling of the erased part"),
    "AUG.RECOUNT": Key(1, at_least(1), "erased parts at most"),
    "AUG.MIXUP": Key(0.8, at_least(0), "mixup alpha; 0: off"),
    "AUG.CUTMIX": Key(1.0, at_least(0), "cutmix alpha; 0: off"),
    "AUG.CUTMIX_MINMAX": Key(None, FRACTION, "null, or smallest and largest side of the cutmix box", float, True, True),
    "AUG.MIXUP_PROB": Key(1.0, FRACTION, "probability of mixup or cutmix"),
    "AUG.MIXUP_SWITCH_PROB": Key(0.5, FRACTION, "probability of cutmix where both are on"),
    "AUG.MIXUP_MODE": Key("batch", one_of("batch", "pair", "elem"), "what shares one mixing ratio"),
    "AUG.MESA": Key(0.0, at_least(0), "weight of the EMA model's output as a second target; 0: off"),
    "TEST.CROP": Key(True, YES_NO, "resize the short side to 256/224 of the size and crop; else resize both sides"),
    "TEST.COMPILE": Key("off", COMPILE_MODE, "as TRAIN.COMPILE, in --eval and --throughput; also prepares weights"),
    "AMP": Key(False, YES_NO, "16-bit autocast"),
    "AMP_DTYPE": Key("auto", one_of("auto", "float16", "bfloat16"), "auto: bfloat16 where the device has it"),
    "OUTPUT": Key("output", Rule("not empty", bool), "results go to OUTPUT/MODEL.NAME/TAG"),
    "TAG": Key("default", Rule("not empty", bool), "tells runs of one model apart"),
    "SAVE_FREQ": Key(1, at_least(1), "epochs between checkpoints"),
    "PRINT_FREQ": Key(10, at_least(1), "steps between lines in the log"),
    "LOG.PICTURE_EPOCHS": Key(
        10, at_least(0), "epochs (and 5 minutes) between pictures of predictions; 0: only at the end"
    ),
    "LOG.WANDB": Key("", ANY, "project at Weights & Biases to log to besides TensorBoard; '': none"),
    "SEED": Key(0, between(0, 2**31), "of weights, order and augmentation"),
    "EVAL_MODE": Key(False, YES_NO, "only evaluate"),
    "THROUGHPUT_MODE": Key(False, YES_NO, "only measure speed, on synthetic images"),
    "BENCHMARK.TRAIN": Key(False, YES_NO, "measure the training step instead of inference"),
    "BENCHMARK.BASELINES": Key("", BASELINES, "models to measure beside it, timm:convnext_tiny,timm:swin_tiny say"),
    "BENCHMARK.SIZES": Key("", SIZES, "sides of images for a table of the cost of a pixel, 224,384,512 say"),
    "PROFILE_MODE": Key(False, YES_NO, "only count parameters and MACs"),
    "LOCAL_RANK": Key(0, at_least(0), "set by the launcher"),
}


def load_config(path: str | Path, opts: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> CfgNode:
    """Merge defaults, a YAML file with its BASE files, `KEY VALUE ...` pairs and flags into a checked, frozen node.

    Raises:
        ConfigError: a missing file, an unknown key, a wrong type, a value out of range, or values that contradict.
    """
    values = merge_settings(SCHEMA, path, opts, flags)
    refuse_idle_benchmark(values, {*opts[::2], *(flags or {})})
    check_together(values)
    return frozen_node(values)


def refuse_idle_benchmark(values: Mapping[str, Any], typed: Set[str]) -> None:
    """Raise ConfigError where what to measure was typed, but not --throughput: it would be ignored.

    Files may hold it, as the configuration that a measurement leaves behind does.
    """
    for name in sorted(typed):
        if name.startswith("BENCHMARK.") and values[name] and not values["THROUGHPUT_MODE"]:
            flag = {"TRAIN": "--train", "BASELINES": "--baseline", "SIZES": "--sizes"}[name.removeprefix("BENCHMARK.")]
            raise ConfigError(f"{name} {values[name]!r}: {flag} says what --throughput measures; add --throughput")


def check_together(values: Mapping[str, Any]) -> None:
    """Raise ConfigError where values that are right alone contradict each other."""

    def refuse(name: str, reason: str) -> None:
        raise ConfigError(f"{name} {values[name]!r}: {reason}")

    if values["TRAIN.WARMUP_EPOCHS"] >= values["TRAIN.EPOCHS"]:
        refuse("TRAIN.WARMUP_EPOCHS", f"must be below TRAIN.EPOCHS, which is {values['TRAIN.EPOCHS']}")
    for name in ("TRAIN.MIN_LR", "TRAIN.WARMUP_LR"):
        if values[name] > values["TRAIN.BASE_LR"]:
            refuse(name, f"must not be above TRAIN.BASE_LR, which is {values['TRAIN.BASE_LR']}")
    for name in ("AUG.SCALE", "AUG.RATIO", "AUG.CUTMIX_MINMAX", "TRAIN.OPTIMIZER.BETAS"):
        if values[name] is not None and len(values[name]) != 2:
            refuse(name, "must have two values")
        if values[name] is not None and name.startswith("AUG") and values[name][0] > values[name][1]:
            refuse(name, "must have the smaller value first")
    for section in ("MODEL.MLLA", "MODEL.LINEAR_VIT"):
        depths, num_heads = values[f"{section}.DEPTHS"], values[f"{section}.NUM_HEADS"]
        if len(depths) != len(num_heads):
            refuse(f"{section}.NUM_HEADS", f"must be as many as {section}.DEPTHS, {depths}")
        for stage, heads in enumerate(num_heads):
            if (width := values[f"{section}.EMBED_DIM"] * 2**stage) % heads or width % 4:
                reason = f"stage {stage} is {width} wide: its {heads} heads and 4 must divide that"
                refuse(f"{section}.NUM_HEADS", reason)
    if values["DATA.ZIP_MODE"] and values["DATA.DATASET"] not in ("imagenet", "folder"):
        refuse(
            "DATA.ZIP_MODE", f"DATA.DATASET is {values['DATA.DATASET']}, which comes without archives; leave out --zip"
        )
    if values["TRAIN.ACTIVATION_BUDGET"] < 1 and values["TRAIN.COMPILE"] == "off":
        refuse("TRAIN.ACTIVATION_BUDGET", "works in compiled blocks: set TRAIN.COMPILE auto, or use --use-checkpoint")
    if values["DATA.CLASSES"] and values["DATA.DATASET"] != "digits":
        refuse("DATA.CLASSES", f"works with DATA.DATASET digits, not {values['DATA.DATASET']}: leave out class folders")
    for name in ("MODEL.MLLA.IN_CHANS", "MODEL.LINEAR_VIT.IN_CHANS"):
        if values[name] != 3 and not (values["THROUGHPUT_MODE"] or values["PROFILE_MODE"]):
            refuse(name, "images are read as RGB: must be 3")
    if values["EVAL_MODE"] or values["THROUGHPUT_MODE"] or values["PROFILE_MODE"]:
        return  # the rest is about training
    if values["TRAIN.FREEZE"] and not (values["MODEL.PRETRAINED"] or values["MODEL.RESUME"]):
        refuse("TRAIN.FREEZE", "a backbone that stays as it is needs weights; name some with --pretrained")
    if values["TRAIN.START_EPOCH"] >= (epochs := values["TRAIN.EPOCHS"] + values["TRAIN.COOLDOWN_EPOCHS"]):
        refuse("TRAIN.START_EPOCH", f"must be below the number of epochs, {epochs}")
    if (sides := values["AUG.CUTMIX_MINMAX"]) and len({int(values["DATA.IMG_SIZE"] * side) for side in sides}) == 1:
        refuse("AUG.CUTMIX_MINMAX", f"must differ by a pixel at least, at DATA.IMG_SIZE {values['DATA.IMG_SIZE']}")
    mixes = values["AUG.MIXUP"] or values["AUG.CUTMIX"] or values["AUG.CUTMIX_MINMAX"]
    if mixes and values["DATA.BATCH_SIZE"] % 2:
        refuse("DATA.BATCH_SIZE", "must be even with mixup or cutmix, which pair images; or set those AUG keys to 0")
    if values["EMA.FORCE_CPU"] and values["EMA.ENABLED"] and values["AUG.MESA"]:
        refuse("EMA.FORCE_CPU", "MESA runs the EMA model on every batch; set AUG.MESA to 0 or EMA.FORCE_CPU to False")


@dataclass(frozen=True)
class Derived:
    """What follows from a configuration, the number of processes and the size of the training set."""

    global_batch: int  # images per optimizer step, over all processes
    steps_per_epoch: int
    total_epochs: int  # cool-down included
    schedule_steps: int  # without cool-down
    warmup_steps: int
    decay_steps: int  # between decays of the step schedule
    base_lr: float
    warmup_lr: float
    min_lr: float
    ema_decay: float  # per step
    mesa_start_epoch: int


def derive(config: CfgNode, *, num_processes: int, num_train_images: int) -> Derived:
    """Global batch, steps and scaled rates of a run; the configuration itself stays unscaled.

    Raises:
        ConfigError: the training set is too small for one step.
    """
    train = config.TRAIN
    global_batch = config.DATA.BATCH_SIZE * num_processes * train.ACCUMULATION_STEPS
    steps_per_epoch = num_train_images // num_processes // config.DATA.BATCH_SIZE // train.ACCUMULATION_STEPS
    if steps_per_epoch == 0:
        raise ConfigError(
            f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} x {num_processes} processes x {train.ACCUMULATION_STEPS} "
            f"accumulation steps is more than the {num_train_images} training images; lower --batch-size"
        )
    scale = global_batch / 512
    return Derived(
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        total_epochs=train.EPOCHS + train.COOLDOWN_EPOCHS,
        schedule_steps=train.EPOCHS * steps_per_epoch,
        warmup_steps=train.WARMUP_EPOCHS * steps_per_epoch,
        decay_steps=train.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch,
        base_lr=train.BASE_LR * scale,
        warmup_lr=train.WARMUP_LR * scale,
        min_lr=train.MIN_LR * scale,
        ema_decay=config.EMA.DECAY ** (global_batch / 4096),
        mesa_start_epoch=int(0.25 * train.EPOCHS),
    )

"""Configuration of classification: keys with default, allowed values and meaning, and checks across keys.

Later ones win: defaults, the files under BASE, the file itself, --opts, flags that were typed. The result is frozen.
Steps are optimizer steps; learning rates are for a global batch size of 512.
"""

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from utils.checkpoint.download import check_timm_model
from utils.config.command_line import MAX_SIDE, MAX_WORKERS
from utils.config.schema import (
    ABOVE_0_TO_1,
    BELOW_ONE,
    FRACTION,
    NOT_EMPTY,
    Key,
    Rule,
    Section,
    above,
    at_least,
    between,
    frozen_node,
    merge_settings,
    one_of,
    refuse,
)

COMPILE_MODE = one_of("auto", "off", "graphs", "default", "reduce-overhead", "max-autotune")
DATASET = Rule(
    "imagenet, folder, digits, idx, idx/<folder>, hfds/<folder or name> or wds/<folder>",
    lambda value: value in ("imagenet", "folder", "digits", "idx") or value.startswith(("idx/", "hfds/", "wds/")),
)
POLICY = Rule(
    "none, rand-..., augmix-..., original, v0 or 3a",
    lambda value: (
        value.split("-")[0] in ("none", "rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
        and not re.search("-[nwd][0-9]{3}", value)
    ),  # operations per image
)
MODEL_TYPE = Rule(
    "mlla, linear_vit or timm:NAME", lambda value: value in ("mlla", "linear_vit") or value.startswith("timm:")
)
BASELINES = Rule(
    "timm:NAME, with commas between several",
    lambda value: all(name.startswith("timm:") for name in value.split(",") if value),
)


def numbers(low: int, high: int) -> Rule:
    """Return the rule for whole numbers in a range, with commas between; none are allowed too."""
    return Rule(
        f"whole numbers from {low} to {high}, with commas between",
        lambda value: (
            not value
            or all(re.fullmatch("[0-9]{1,5}", number) and low <= int(number) <= high for number in value.split(","))
        ),
    )


ALPHA = Rule("0, or from 0.001 to 1000", lambda value: value == 0 or 0.001 <= value <= 1000)
SUBFOLDER = Rule(
    "a path within OUTPUT, without ..",
    lambda value: bool(Path(value).parts) and not Path(value).is_absolute() and ".." not in Path(value).parts,
)

# Upper bounds, above which a value is a mistake that would exhaust memory or overflow
MAX_COUNT = 1_000_000
MAX_FACTOR = 1_000_000  # of learning rates and losses
MAX_STEPS = 1_000_000_000
MAX_WIDTH = 16384  # channels
MAX_STAGES = 8

_C = Section()

_C.BASE = Key([""], help="files to start from, relative to this one")

# ---------------------------------------------------------------------------
# Data settings
# ---------------------------------------------------------------------------
_C.DATA = Section()
_C.DATA.BATCH_SIZE = Key(128, between(1, MAX_COUNT), help="images per process and forward pass")
_C.DATA.DATA_PATH = Key("", help="dataset folder with train/ and val/, which have a folder per class")
_C.DATA.DATASET = Key("imagenet", DATASET, help="imagenet and folder read DATA_PATH; data/README.md has the rest")
_C.DATA.ON_ERROR = Key("raise", one_of("raise", "skip"), help="at an image that cannot be read: stop, or skip it")
_C.DATA.MAX_BAD = Key(100, between(0, MAX_COUNT), help="maximum number of images that skip leaves out, per process")
_C.DATA.EXACT_EVAL = Key(True, help="evaluate on images decoded by Pillow, as published results are; false is faster")
_C.DATA.CLASSES = Key(
    None, type=str, optional=True, is_list=True, help="digits only: classes to keep, such as ['0', '1']; null: all"
)
_C.DATA.IMG_SIZE = Key(224, between(8, MAX_SIDE), help="side of the images, pixels")
_C.DATA.INTERPOLATION = Key(
    "bicubic",
    one_of("bicubic", "bilinear", "random"),
    help="resizing filter; random: one of the two, in evaluation bilinear",
)
_C.DATA.ZIP_MODE = Key(False, help="read train.zip and val.zip with their maps, rather than folders")
_C.DATA.CACHE_MODE = Key(
    "part",
    one_of("no", "part", "full"),
    help="zip archives kept in memory: none (no), each process's share (part) or all (full)",
)
_C.DATA.AUGMENT_ON = Key(
    "auto", one_of("auto", "cpu", "gpu"), help="where training images are augmented; auto: on a GPU, if there is one"
)
_C.DATA.DECODE_ON = Key(
    "cpu", one_of("cpu", "gpu"), help="where JPEGs for training are decoded; gpu: images are augmented there, too"
)
_C.DATA.GPU_DECODE_SHARE = Key(
    1.0, ABOVE_0_TO_1, help="share of the JPEGs that the GPU decodes with DECODE_ON gpu; workers decode the others"
)
_C.DATA.PIN_MEMORY = Key(True, help="page-locked batches, for faster copies to a GPU")
_C.DATA.NUM_WORKERS = Key(
    "auto",
    between(0, MAX_WORKERS),
    type=int,
    words=["auto"],
    help="loader processes per training process; 0 loads in the training process; auto: by the machine's cores",
)

# ---------------------------------------------------------------------------
# Model settings
# ---------------------------------------------------------------------------
_C.MODEL = Section()
_C.MODEL.TYPE = Key("mlla", MODEL_TYPE, help="model family; each reads the section of its name")
_C.MODEL.NAME = Key("mlla_tiny", SUBFOLDER, help="names the output folder")
_C.MODEL.RESUME = Key("", help="checkpoint to resume from, or weights to evaluate: path, URL or mlla-t, -s, -b")
_C.MODEL.PRETRAINED = Key(
    "", help="weights to start from: path, URL or mlla-t, -s, -b; a head for other classes is re-initialized"
)
_C.MODEL.NUM_CLASSES = Key(
    None,
    between(1, MAX_COUNT),
    type=int,
    optional=True,
    help="null: as many as the dataset, else 1000; evaluation accepts more than the dataset has",
)
_C.MODEL.DROP_RATE = Key(0.0, BELOW_ONE, help="dropout after the stem and in the MLPs")
_C.MODEL.DROP_PATH_RATE = Key(0.1, BELOW_ONE, help="stochastic depth of the last block, rising linearly from 0")
_C.MODEL.LABEL_SMOOTHING = Key(0.1, FRACTION, help="share of the label spread over all classes")
_C.MODEL.KERNELS = Key("auto", one_of("auto", "triton", "torch"), help="Triton kernels: if supported, always, or never")
_C.MODEL.LAYER_DECAY = Key(1.0, ABOVE_0_TO_1, help="learning rate of each block over the next one's; 1: all the same")

# MLLA
_C.MODEL.MLLA = Section()
_C.MODEL.MLLA.PATCH_SIZE = Key(4, one_of(4), help="stride of the stem")
_C.MODEL.MLLA.IN_CHANS = Key(3, between(1, 1024), help="image channels")
_C.MODEL.MLLA.EMBED_DIM = Key(
    96, between(4, MAX_WIDTH), help="token width of the first stage; it doubles with each stage"
)
_C.MODEL.MLLA.DEPTHS = Key([2, 2, 6, 2], between(1, 256), help="blocks per stage")
_C.MODEL.MLLA.NUM_HEADS = Key([3, 6, 12, 24], between(1, MAX_WIDTH), help="heads per stage; must divide its width")
_C.MODEL.MLLA.MLP_RATIO = Key(4.0, between(0.001, 1000), help="hidden width of the MLP over its input width")
_C.MODEL.MLLA.QKV_BIAS = Key(True, help="bias in the projection to q and k")
_C.MODEL.MLLA.APE = Key(False, help="add a learned absolute position embedding")

# Linear ViT, the model of the ablation study
_C.MODEL.LINEAR_VIT = Section()
_C.MODEL.LINEAR_VIT.PATCH_SIZE = Key(4, between(1, MAX_SIDE), help="side of a patch, pixels")
_C.MODEL.LINEAR_VIT.IN_CHANS = Key(3, between(1, 1024), help="image channels of linear_vit")
_C.MODEL.LINEAR_VIT.EMBED_DIM = Key(
    96, between(4, MAX_WIDTH), help="token width of linear_vit's first stage; it then doubles"
)
_C.MODEL.LINEAR_VIT.DEPTHS = Key([2, 2, 6, 2], between(1, 256), help="blocks per stage of linear_vit")
_C.MODEL.LINEAR_VIT.NUM_HEADS = Key([3, 6, 12, 24], between(1, MAX_WIDTH), help="heads per stage of linear_vit")
_C.MODEL.LINEAR_VIT.MLP_RATIO = Key(
    4.0, between(0.001, 1000), help="hidden width of linear_vit's MLP over its input width"
)
_C.MODEL.LINEAR_VIT.QKV_BIAS = Key(True, help="bias in the projections to q, k and v")
_C.MODEL.LINEAR_VIT.INPUT_GATE = Key(False, help="multiply V by softplus(x W1 W2 + b)")
_C.MODEL.LINEAR_VIT.FORGET_GATE = Key(False, help="let the state decay; tokens are read in raster order")
_C.MODEL.LINEAR_VIT.SHORTCUT = Key(False, help="add D * V, D a learned vector")
_C.MODEL.LINEAR_VIT.NORMALISE = Key(True, help="divide by Q Z")
_C.MODEL.LINEAR_VIT.SINGLE_HEAD = Key(False, help="one head of Q and K, as wide as one of NUM_HEADS, for all of V")
_C.MODEL.LINEAR_VIT.BLOCK = Key(
    "transformer",
    one_of("transformer", "sub", "all"),
    help="Mamba's gated block replaces nothing, the attention, or the whole block",
)
_C.MODEL.LINEAR_VIT.APE = Key(False, help="add learned absolute position embeddings, one in each block")
_C.MODEL.LINEAR_VIT.LEPE = Key(False, help="add a depthwise convolution of V after attention")
_C.MODEL.LINEAR_VIT.CPE = Key(False, help="add depthwise convolutions before attention and before the MLP")
_C.MODEL.LINEAR_VIT.ROPE = Key(False, help="rotate Q and K by their tokens' rows and columns")

# Classifiers of timm, such as timm:resnet18
_C.MODEL.TIMM = Section()
_C.MODEL.TIMM.ARGS = Key("", help="arguments of timm's model, such as depths=[1,1,2,1] patch_size=2")

# ---------------------------------------------------------------------------
# Training settings
# ---------------------------------------------------------------------------
_C.TRAIN = Section()
_C.TRAIN.START_EPOCH = Key(0, between(0, MAX_COUNT), help="first epoch, unless a checkpoint is resumed")
_C.TRAIN.EPOCHS = Key(300, between(1, MAX_COUNT), help="epochs of the schedule, warm-up included")
_C.TRAIN.WARMUP_EPOCHS = Key(20, between(0, MAX_COUNT), help="epochs of linear warm-up; below EPOCHS")
_C.TRAIN.COOLDOWN_EPOCHS = Key(
    0, between(0, MAX_COUNT), help="epochs after the schedule, at its last rate; step decays on"
)
_C.TRAIN.WEIGHT_DECAY = Key(0.05, between(0, MAX_FACTOR), help="on tensors of two or more dimensions")
_C.TRAIN.BASE_LR = Key(5e-4, above(0, MAX_FACTOR), help="learning rate after warm-up, for a global batch size of 512")
_C.TRAIN.WARMUP_LR = Key(5e-7, between(0, MAX_FACTOR), help="learning rate of the first step, likewise for 512")
_C.TRAIN.MIN_LR = Key(5e-6, between(0, MAX_FACTOR), help="learning rate at the end of cosine, likewise for 512")
_C.TRAIN.CLIP_GRAD = Key(5.0, at_least(0), help="maximum L2 norm of all gradients together; 0: no clipping")
_C.TRAIN.AUTO_RESUME = Key(True, help="resume from the newest complete checkpoint in the output folder")
_C.TRAIN.SAVE_STEPS = Key(
    0, between(0, MAX_STEPS), help="steps between checkpoints within epochs; 0: only at their ends"
)
_C.TRAIN.ON_SAVE_ERROR = Key("continue", one_of("continue", "stop"), help="if a checkpoint cannot be saved")
_C.TRAIN.SAVE_IN_BACKGROUND = Key(True, help="continue training while a checkpoint is written to disk")
_C.TRAIN.ACCUMULATION_STEPS = Key(
    1, between(1, MAX_COUNT), help="gradient accumulation steps: forward passes per optimizer step"
)
_C.TRAIN.FREEZE = Key(False, help="train the classifier alone; all else keeps its weights and statistics")
_C.TRAIN.USE_CHECKPOINT = Key(False, help="activation checkpointing: recompute blocks in backward to save memory")
_C.TRAIN.COMPILE = Key(
    "auto", COMPILE_MODE, help="graphs: the step is a CUDA graph; default: blocks are compiled; others: both"
)
_C.TRAIN.ACTIVATION_BUDGET = Key(
    1.0,
    FRACTION,
    help="share of activations that compiled blocks keep for the backward pass; the rest is recomputed",
)
_C.TRAIN.DETERMINISTIC = Key(False, help="the same bits in every run with these settings on GPUs of one kind; slower")
_C.TRAIN.FIND_UNUSED_PARAMS = Key(False, help="several processes: allow parameters without gradient")

# Learning-rate schedule
_C.TRAIN.LR_SCHEDULER = Section()
_C.TRAIN.LR_SCHEDULER.NAME = Key("cosine", one_of("cosine", "linear", "step"), help="shape after warm-up")
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = Key(30, between(1, MAX_COUNT), help="epochs between decays of the step schedule")
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = Key(0.1, FRACTION, help="factor of each decay of the step schedule")

# Optimizer
_C.TRAIN.OPTIMIZER = Section()
_C.TRAIN.OPTIMIZER.NAME = Key("adamw", one_of("adamw", "sgd"), help="sgd is with Nesterov momentum")
_C.TRAIN.OPTIMIZER.EPS = Key(1e-8, above(0, MAX_FACTOR), help="AdamW's epsilon")
_C.TRAIN.OPTIMIZER.BETAS = Key([0.9, 0.999], BELOW_ONE, help="AdamW's two decay rates")
_C.TRAIN.OPTIMIZER.MOMENTUM = Key(0.9, FRACTION, help="SGD's momentum")

# Exponential moving average of the weights
_C.EMA = Section()
_C.EMA.ENABLED = Key(True, help="keep an exponential moving average (EMA) of the weights")
_C.EMA.DECAY = Key(0.9996, FRACTION, help="EMA decay per 4096 images; a step uses DECAY ^ (global batch size / 4096)")
_C.EMA.WARMUP = Key(
    "auto",
    one_of("auto", "on", "off"),
    help="let step t decay by (1 + t) / (10 + t) while that is less; auto: in runs too short for DECAY alone",
)
_C.EMA.FORCE_CPU = Key(False, help="keep the EMA on the CPU; not with AUG.MESA")

# ---------------------------------------------------------------------------
# Augmentation settings
# ---------------------------------------------------------------------------
_C.AUG = Section()
_C.AUG.COLOR_JITTER = Key(0.4, between(0, 100), help="only if AUTO_AUGMENT is none")
_C.AUG.AUTO_AUGMENT = Key("rand-m9-mstd0.5-inc1", POLICY, help="timm's augmentation policy")
_C.AUG.HFLIP = Key(0.5, FRACTION, help="probability of a horizontal flip")
_C.AUG.SCALE = Key(
    None,
    FRACTION,
    type=float,
    optional=True,
    is_list=True,
    help="area of the random crop, smallest and largest share; null: 0.08 to 1, but small images are padded",
)
_C.AUG.RATIO = Key(
    [0.75, 4 / 3], between(0.001, 1000), help="width over height of the random crop, smallest and largest"
)
_C.AUG.REPROB = Key(0.25, FRACTION, help="probability of random erasing")
_C.AUG.REMODE = Key("pixel", one_of("pixel", "rand", "const"), help="filling of the erased part")
_C.AUG.RECOUNT = Key(1, between(1, 100), help="maximum number of erased parts")
_C.AUG.MIXUP = Key(0.8, ALPHA, help="mixup alpha; 0: off")
_C.AUG.CUTMIX = Key(1.0, ALPHA, help="cutmix alpha; 0: off")
_C.AUG.CUTMIX_MINMAX = Key(
    None,
    FRACTION,
    type=float,
    optional=True,
    is_list=True,
    help="null, or smallest and largest side of the cutmix box as a share of the image's",
)
_C.AUG.MIXUP_PROB = Key(1.0, FRACTION, help="probability of mixup or cutmix")
_C.AUG.MIXUP_SWITCH_PROB = Key(0.5, FRACTION, help="probability of cutmix if both are on")
_C.AUG.MIXUP_MODE = Key("batch", one_of("batch", "pair", "elem"), help="what shares one mixing ratio")
_C.AUG.MESA = Key(1.0, between(0, MAX_FACTOR), help="loss weight of the EMA model's output as a second target; 0: off")

# ---------------------------------------------------------------------------
# Testing settings
# ---------------------------------------------------------------------------
_C.TEST = Section()
_C.TEST.CROP = Key(True, help="resize the short side to 256/224 of IMG_SIZE and crop; false: resize both sides to it")
_C.TEST.COMPILE = Key("auto", COMPILE_MODE, help="as TRAIN.COMPILE, for evaluation; also prepares weights")

# ---------------------------------------------------------------------------
# Misc
# ---------------------------------------------------------------------------
_C.AMP = Key(False, help="mixed precision (AMP)")
_C.AMP_DTYPE = Key(
    "auto", one_of("auto", "float16", "bfloat16"), help="auto: bfloat16 if the device has it, with --eval float32"
)
_C.OUTPUT = Key("output", NOT_EMPTY, help="results go to OUTPUT/MODEL.NAME/TAG")
_C.TAG = Key("default", SUBFOLDER, help="tells runs of one model apart")
_C.SAVE_FREQ = Key(1, between(1, MAX_COUNT), help="epochs between checkpoints; 1 keeps the newest three, more keep all")
_C.PRINT_FREQ = Key(100, between(1, MAX_STEPS), help="steps between log lines")

_C.LOG = Section()
_C.LOG.PICTURE_EPOCHS = Key(
    10, between(0, MAX_COUNT), help="epochs (and 5 minutes) between figures of predictions; 0: only at the end"
)
_C.LOG.WANDB = Key("", help="project at Weights & Biases to log to besides TensorBoard; '': none")

_C.SEED = Key(0, between(0, 2**31), help="seed of weights, data order and augmentation")
_C.EVAL_MODE = Key(False, help="only evaluate")
_C.EVAL_EMA = Key(
    None, type=bool, optional=True, help="with --eval: the EMA's weights, or with False the model's; null: both"
)
_C.THROUGHPUT_MODE = Key(False, help="only measure speed, by default on synthetic images")

_C.BENCHMARK = Section()
_C.BENCHMARK.TRAIN = Key(False, help="with --throughput: measure the training step instead of inference")
_C.BENCHMARK.BASELINES = Key(
    "", BASELINES, help="with --throughput: models to compare with, such as timm:convnext_tiny,timm:swin_tiny"
)
_C.BENCHMARK.SIZES = Key(
    "", numbers(8, 16384), help="with --throughput: image sides for a table of time per pixel, such as 224,384,512"
)
_C.BENCHMARK.LOADING = Key(
    "",
    numbers(1, 65536),
    help="with --throughput: batch sizes, such as 128,512, for a table of training from DATA.DATA_PATH",
)

_C.PROFILE_MODE = Key(False, help="only count parameters and MACs")
_C.LOCAL_RANK = Key(0, between(0, 1023), help="set by the launcher")

SCHEMA: dict[str, Key] = _C.flatten()
OWN = Path(__file__).parent / "cfgs"  # configurations that come with the project


def load_config(source: str | Path, opts: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> CfgNode:
    """Merge defaults, a YAML file or text, `KEY VALUE ...` pairs and flags into a checked, frozen node.

    Args:
        source: a YAML file with its BASE files, or YAML text (a str with a newline) such as the dump in a checkpoint.
        opts: alternating keys and values, as typed after --opts.
        flags: values by key, of those flags that were typed.

    Raises:
        ConfigError: a missing file, an unknown key, a wrong type, a value out of range, or values that contradict.
    """
    values = merge_settings(SCHEMA, source, opts, flags, own=OWN)
    check_modes(values)
    check_flags_of_modes(values, {*opts[::2], *(flags or {})})
    check_data(values)
    check_timm(values)
    for section in ("MODEL.MLLA", "MODEL.LINEAR_VIT"):
        check_stages(values, section)
        if not (values["THROUGHPUT_MODE"] or values["PROFILE_MODE"]):
            check_channels(values, section)
    check_linear_vit(values)
    check_schedule(values)
    check_optimizer(values)
    check_ranges(values, "AUG.SCALE", "AUG.RATIO", "AUG.CUTMIX_MINMAX")
    if not (values["EVAL_MODE"] or values["THROUGHPUT_MODE"] or values["PROFILE_MODE"]):
        check_training(values)
        check_mixing(values)
    return frozen_node(values)


# Checks across keys, by section; each raises ConfigError.


def check_modes(values: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the run trains, or is of one other mode."""
    modes = {"EVAL_MODE": "--eval", "THROUGHPUT_MODE": "--throughput", "PROFILE_MODE": "--profile"}
    chosen = [name for name in modes if values[name]]
    if len(chosen) > 1:
        others = " and ".join(f"{name} ({modes[name]})" for name in chosen[:-1])
        refuse(values, chosen[-1], f"only one mode at a time, and {others} is on: leave out all but one")


def check_flags_of_modes(values: Mapping[str, Any], typed: Set[str]) -> None:
    """Raise ConfigError if a key was typed without the mode or setting that reads it, or beside LOADING.

    It would be ignored.

    Files may hold it, as the configuration that a measurement leaves behind does.
    """
    if "EVAL_EMA" in typed and values["EVAL_EMA"] is not None and not values["EVAL_MODE"]:
        refuse(values, "EVAL_EMA", "--ema and --no-ema choose the weights that --eval evaluates; add --eval")
    if "DATA.GPU_DECODE_SHARE" in typed and values["DATA.DECODE_ON"] != "gpu":
        refuse(values, "DATA.GPU_DECODE_SHARE", "is of the JPEGs that a GPU decodes; set DATA.DECODE_ON gpu too")
    flags = {"TRAIN": "--train", "BASELINES": "--baseline", "SIZES": "--sizes", "LOADING": "BENCHMARK.LOADING"}
    for leaf, flag in flags.items():
        name = f"BENCHMARK.{leaf}"
        if name not in typed or not values[name]:
            continue
        if not values["THROUGHPUT_MODE"]:
            refuse(values, name, f"{flag} says what --throughput measures; add --throughput")
        if leaf != "LOADING" and values.get("BENCHMARK.LOADING"):
            refuse(values, name, f"BENCHMARK.LOADING measures training from files alone; leave out {flag}")


def check_data(values: Mapping[str, Any]) -> None:
    dataset = values["DATA.DATASET"]
    if values["DATA.ZIP_MODE"] and dataset not in ("imagenet", "folder"):
        refuse(values, "DATA.ZIP_MODE", f"DATA.DATASET is {dataset}, which comes without archives; leave out --zip")
    if values["DATA.CLASSES"] and dataset != "digits":
        refuse(values, "DATA.CLASSES", f"works with DATA.DATASET digits, not {dataset}: leave out class folders")
    if values["DATA.DECODE_ON"] == "gpu" and values["DATA.AUGMENT_ON"] == "cpu":
        refuse(values, "DATA.DECODE_ON", "images that a GPU decodes stay there; leave out DATA.AUGMENT_ON cpu")


def check_timm(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if timm lacks a model, or arguments are for one while there is none."""
    if values["MODEL.TYPE"].startswith("timm:"):
        check_timm_model("MODEL.TYPE", values["MODEL.TYPE"])
    elif values["MODEL.TIMM.ARGS"]:
        refuse(values, "MODEL.TIMM.ARGS", f"works with MODEL.TYPE timm:NAME, not {values['MODEL.TYPE']}")
    for name in filter(None, values["BENCHMARK.BASELINES"].split(",")):
        check_timm_model("BENCHMARK.BASELINES", name)


def check_stages(values: Mapping[str, Any], section: str) -> None:
    """Raise ConfigError unless each stage of a model's section has a number of heads that divides its width."""
    depths, num_heads = values[f"{section}.DEPTHS"], values[f"{section}.NUM_HEADS"]
    if len(depths) > MAX_STAGES:
        refuse(values, f"{section}.DEPTHS", f"must have at most {MAX_STAGES} stages")
    if (width := values[f"{section}.EMBED_DIM"] * 2 ** (len(depths) - 1)) > MAX_WIDTH:
        refuse(values, f"{section}.EMBED_DIM", f"the last stage would be {width} wide; must be at most {MAX_WIDTH}")
    if int(values[f"{section}.EMBED_DIM"] * values[f"{section}.MLP_RATIO"]) < 1:
        refuse(values, f"{section}.MLP_RATIO", "leaves the MLP no channels; raise it")
    if len(depths) != len(num_heads):
        refuse(values, f"{section}.NUM_HEADS", f"must be as many as {section}.DEPTHS, {depths}")
    for stage, heads in enumerate(num_heads):
        if (width := values[f"{section}.EMBED_DIM"] * 2**stage) % heads or width % 4:
            reason = f"stage {stage} is {width} wide: its {heads} heads and 4 must divide that"
            refuse(values, f"{section}.NUM_HEADS", reason)


def check_linear_vit(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if linear_vit's patches do not fit the image, or rotary embedding its single head."""
    section = "MODEL.LINEAR_VIT"
    if values["MODEL.TYPE"] == "linear_vit" and values[f"{section}.PATCH_SIZE"] > (size := values["DATA.IMG_SIZE"]):
        refuse(values, f"{section}.PATCH_SIZE", f"must not be above DATA.IMG_SIZE, which is {size}")
    if values[f"{section}.ROPE"] and values[f"{section}.SINGLE_HEAD"]:
        for stage, heads in enumerate(values[f"{section}.NUM_HEADS"]):
            if (width := values[f"{section}.EMBED_DIM"] * 2**stage // heads) % 4:
                reason = f"stage {stage}: a single head is {width} wide; with ROPE it must be a multiple of 4"
                refuse(values, f"{section}.NUM_HEADS", reason)


def check_channels(values: Mapping[str, Any], section: str) -> None:
    if values[f"{section}.IN_CHANS"] != 3:
        refuse(values, f"{section}.IN_CHANS", "images are read as RGB: must be 3")


def check_schedule(values: Mapping[str, Any]) -> None:
    if values["TRAIN.WARMUP_EPOCHS"] >= values["TRAIN.EPOCHS"]:
        refuse(values, "TRAIN.WARMUP_EPOCHS", f"must be below TRAIN.EPOCHS, which is {values['TRAIN.EPOCHS']}")
    for name in ("TRAIN.MIN_LR", "TRAIN.WARMUP_LR"):
        if values[name] > values["TRAIN.BASE_LR"]:
            refuse(values, name, f"must not be above TRAIN.BASE_LR, which is {values['TRAIN.BASE_LR']}")
    if values["TRAIN.ACTIVATION_BUDGET"] < 1 and values["TRAIN.COMPILE"] == "off":
        reason = "works in compiled blocks: set TRAIN.COMPILE auto, or use --use-checkpoint"
        refuse(values, "TRAIN.ACTIVATION_BUDGET", reason)


def check_optimizer(values: Mapping[str, Any]) -> None:
    if len(values["TRAIN.OPTIMIZER.BETAS"]) != 2:
        refuse(values, "TRAIN.OPTIMIZER.BETAS", "must have two values")


def check_ranges(values: Mapping[str, Any], *names: str) -> None:
    """Raise ConfigError unless each of these keys is null or has two values, the smaller one first, not both 0."""
    for name in names:
        if values[name] is not None and len(values[name]) != 2:
            refuse(values, name, "must have two values")
        if values[name] is not None and values[name][0] > values[name][1]:
            refuse(values, name, "must have the smaller value first")
        if values[name] is not None and values[name][1] <= 0:
            refuse(values, name, "must have a second value above 0")


def check_training(values: Mapping[str, Any]) -> None:
    """Raise ConfigError where settings contradict each other that matter to training alone."""
    if values["TRAIN.FREEZE"] and not (values["MODEL.PRETRAINED"] or values["MODEL.RESUME"]):
        refuse(values, "TRAIN.FREEZE", "a frozen backbone needs weights; name some with --pretrained")
    if values["TRAIN.START_EPOCH"] >= (epochs := values["TRAIN.EPOCHS"] + values["TRAIN.COOLDOWN_EPOCHS"]):
        refuse(values, "TRAIN.START_EPOCH", f"must be below the number of epochs, {epochs}")
    if values["EMA.FORCE_CPU"] and values["EMA.ENABLED"] and values["AUG.MESA"]:
        reason = "MESA runs the EMA model on every batch; set AUG.MESA to 0 or EMA.FORCE_CPU to False"
        refuse(values, "EMA.FORCE_CPU", reason)


def check_mixing(values: Mapping[str, Any]) -> None:
    """Raise ConfigError where mixup or cutmix cannot work in training."""
    size, sides = values["DATA.IMG_SIZE"], values["AUG.CUTMIX_MINMAX"]
    if sides and len({int(size * side) for side in sides}) == 1:
        refuse(values, "AUG.CUTMIX_MINMAX", f"must differ by a pixel at least, at DATA.IMG_SIZE {size}")
    if (values["AUG.MIXUP"] or values["AUG.CUTMIX"] or sides) and values["DATA.BATCH_SIZE"] % 2:
        reason = "must be even with mixup or cutmix, which pair images; or set those AUG keys to 0"
        refuse(values, "DATA.BATCH_SIZE", reason)

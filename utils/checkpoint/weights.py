"""Weights by name: found in a file's content, and put into a model, every one of them."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.logs.logger import logger

Weights = dict[str, Tensor]

MAX_KEYS_SHOWN = 10
MAX_CLASSES_SHOWN = 3
# Where weights are kept, first of all here and in the official code, then in timm's and OpenMMLab's files.
KEYS = {"model": ("model", "state_dict"), "state_dict_ema": ("state_dict_ema", "model_ema", "ema_state_dict")}
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DDP, torch.compile
POSITION_TABLE = "absolute_pos_embed"
DERIVED_KEY_SUFFIX = "attn.rope.rotations"
FINAL_PART = re.compile(r"(norm\d*|head|fc|classifier)\.")  # the latter two of timm's models


class FoundWeights(NamedTuple):
    """What a file holds: the model's weights, the average's, or both, and the names of the classes if it says them."""

    model: Weights | None
    average: Weights | None
    classes: list[str] | None


def read_weights(source: str | Path, *, tolerant: bool = False) -> FoundWeights:
    """The weights of a file, by path, URL or name of released weights.

    Args:
        source: of the file.
        tolerant: pass over unknown objects beside the weights, such as an OpenMMLab file has; they are never made.

    Raises:
        CheckpointError: the file cannot be read, or holds none.
        DownloadError: a URL's file cannot be had.
    """
    content = load_checkpoint(source, tolerant=tolerant)
    found = FoundWeights(weights_in(content, "model"), weights_in(content, "state_dict_ema"), classes_in(content))
    if found.model is None and found.average is None:
        raise no_weights_error(str(source), content)
    return found


def read_state_dict(source: str | Path, *, average: bool = True) -> Weights:
    """The weights of any file of the family, also of a whole detector or segmentor, without the model they are for.

    Unknown objects beside the weights, such as an OpenMMLab file has, are passed over and never made.

    Args:
        source: a path, a URL, or the name of released weights.
        average: take the average's weights where the file has both; else the model's.

    Returns:
        Tensors by name, on the CPU, without rotary tables, which follow from the size of the image.

    Raises:
        CheckpointError: the file cannot be read, or holds no weights.
        DownloadError: a URL's file cannot be had.
    """
    content = load_checkpoint(source, tolerant=True)
    kinds = ("state_dict_ema", "model") if average else ("model", "state_dict_ema")
    for kind in kinds:
        if (weights := weights_in(content, kind)) is not None:
            return {name: value for name, value in weights.items() if not name.endswith(DERIVED_KEY_SUFFIX)}
    raise no_weights_error(str(source), content)


def no_weights_error(source: str, content: dict[str, Any]) -> CheckpointError:
    found = ", ".join(map(str, list(content)[:MAX_KEYS_SHOWN])) or "nothing"
    keys = ", ".join(key for keys in KEYS.values() for key in keys)
    return CheckpointError(f"{source}: no weights under {keys}, nor bare ones; found {found}")


def weights_in(content: dict[str, Any], kind: str) -> Weights | None:
    """Weights by name from a file's content: the model's ("model") or the average's ("state_dict_ema"), or None.

    A bare state_dict counts as "model". Prefixes of wrappers, `module.` say, are taken off where every name has them.
    """
    for weights in (*(content.get(key) for key in KEYS[kind]), content if kind == "model" else None):
        if isinstance(weights, dict) and weights and all(map(is_weight, weights.items())):
            found: Weights = dict(weights)
            while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in found)), None):
                found = {name.removeprefix(prefix): value for name, value in found.items()}
            return found
    return None


def is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def classes_in(content: dict[str, Any]) -> list[str] | None:
    """The names of a file's classes in the order of its outputs, or None where it does not say."""
    classes = content.get("classes")
    is_list = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return classes if is_list and classes else None


def check_classes(stored: Sequence[str] | None, classes: Sequence[str], source: str | Path) -> None:
    """Compare a file's classes with the data's: other names are pointed out in the log.

    Raises:
        CheckpointError: their numbers differ.
    """
    if stored is None:
        return
    if len(stored) != len(classes):
        raise CheckpointError(
            f"{source}: was trained on {len(stored)} classes ({listed(stored, MAX_CLASSES_SHOWN)}), the data has "
            f"{len(classes)} ({listed(classes, MAX_CLASSES_SHOWN)}); use its own data, or --pretrained to fine-tune"
        )
    if changed := [f"{i} was {a}, is {b}" for i, (a, b) in enumerate(zip(stored, classes, strict=True)) if a != b]:
        logger.warning(
            "%s: was trained on other classes than the data's, %d of %d differ: %s",
            *(source, len(changed), len(classes), listed(changed, MAX_CLASSES_SHOWN)),
        )


def listed(items: Sequence[str], count: int) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def load_weights(
    model: nn.Module,
    weights: Weights,
    source: str | Path,
    *,
    fresh: Collection[str] = (),
    unused: Collection[str] = (),
) -> None:
    """Copy weights into a model, every one of them; rotary tables in a file are derived, and passed over.

    Args:
        model: not wrapped in DDP.
        weights: by name.
        source: the file's name, for messages.
        fresh: modules of the model that keep their own weights where the file's are missing or of another shape.
        unused: modules of the file that the model does without.

    Raises:
        CheckpointError: names or shapes do not fit; says how many, and the first ten.
    """
    own = model.state_dict()
    weights = {
        name: value
        for name, value in weights.items()
        if not name.endswith(DERIVED_KEY_SUFFIX) and not (is_within(name, unused) and name not in own)
    }
    for name in own:
        fits = name in weights and weights[name].shape == own[name].shape
        if is_within(name, fresh) and not fits:
            weights[name] = own[name]
    misshapen = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    problems = {
        "missing": [name for name in own if name not in weights],
        "not in the model": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} where the model has {tuple(own[name].shape)}" for name in misshapen
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(p)} {what}: {listed(p, MAX_KEYS_SHOWN)}" for what, p in problems.items() if p)
        raise CheckpointError(f"{source}: does not fit the model. {found}. Use the --cfg that it was trained with")
    model.load_state_dict(weights)


def is_within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def load_pretrained(model: nn.Module, source: str | Path, classes: Sequence[str] | None = None) -> None:
    """Start a model from a file's weights, the average's if there are some, and log what does not come from the file.

    Another number of classes leaves the classifier as it is, and so does a file without one. A position table of
    another image size is resized bicubically. Of a detector or segmentor the backbone is taken. Between a classifier
    and a dense backbone all goes over but their norms: `norm` and `head` here, `norm0`, `norm1`, ... there.

    Args:
        model: a classifier or a dense backbone, not wrapped in DDP.
        source: a path, a URL, or the name of released weights.
        classes: the data's, to compare with the file's.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit.
        DownloadError: a URL's file cannot be had.
    """
    found = read_weights(source)
    weights = found.average or found.model or {}
    own = model.state_dict()
    logger.info("weights from %s%s", source, " (the average's)" if found.average and found.model else "")
    if any(name.startswith("backbone.") for name in weights):
        weights = {n.removeprefix("backbone."): value for n, value in weights.items() if n.startswith("backbone.")}
        logger.info("the file holds a dense predictor, of which the backbone is taken")
    unused = final_parts(weights) - final_parts(own)
    fresh = final_parts(own) - final_parts(weights) if is_dense(weights) != is_dense(own) else {"head"} & {*unused}
    if "head.weight" in own and "head.weight" not in weights:
        fresh |= {"head"}
    elif "head.weight" in own and len(weights["head.weight"]) != len(own["head.weight"]):
        fresh |= {"head"}
        logger.info("the file has %d classes, the data %d", len(weights["head.weight"]), len(own["head.weight"]))
    elif found.classes and classes:
        check_classes(found.classes, classes, source)
    if fresh:
        logger.info("not from the file, these start fresh: %s", ", ".join(sorted(fresh)))
    if unused:
        logger.info("in the file and not used: %s", ", ".join(sorted(unused)))
    load_weights(model, with_resized_tables(weights, own, source), source, fresh=fresh, unused=unused)


def is_dense(weights: Weights) -> bool:
    """Whether these are a dense backbone's."""
    return "norm0.weight" in weights


def final_parts(weights: Weights) -> set[str]:
    """Of the modules by which a classifier and a dense backbone differ, those that have weights."""
    return {name.split(".")[0] for name in weights if FINAL_PART.match(name)}


def with_resized_tables(weights: Weights, own: Weights, source: str | Path) -> Weights:
    """The weights, with position tables (1, N, E) of another grid, MLLA's or each block's, resized to the model's."""
    resized = {}
    for name in (name for name in own if name.endswith(POSITION_TABLE) and name in weights):
        table, target = weights[name], own[name]
        if table.shape == target.shape or table.ndim != 3:
            continue
        side, new_side = int(table.shape[1] ** 0.5), int(target.shape[1] ** 0.5)
        if side * side != table.shape[1] or table.shape[2] != target.shape[2]:
            continue  # another architecture, which load_weights describes
        logger.info("%s: position table resized from %dx%d to %dx%d tokens", source, side, side, new_side, new_side)
        resized[name] = resample_abs_pos_embed(
            table, [new_side, new_side], [side, side], num_prefix_tokens=0, interpolation="bicubic", antialias=False
        )
    return {**weights, **resized}

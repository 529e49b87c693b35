"""Weights by name: finding them in a file's content, and loading them into a model, every one of them."""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from timm.layers import resample_abs_pos_embed
from torch import nn

from utils.checkpoint.best_weights import choose_weights, is_ema_better, lacking_weights, scores_in
from utils.checkpoint.weight_sets import (
    EMA_KEYS,
    MODEL_KEYS,
    Weights,
    described_type,
    find_weight_sets,
    is_convertible,
)
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.logs.logger import logger

MAX_KEYS_SHOWN = 10
MAX_CLASSES_SHOWN = 3
POSITION_TABLE = "absolute_pos_embed"
DERIVED_KEY_SUFFIX = "attn.rope.rotations"
# The classifier in MLLA, and in most models of timm.
CLASSIFIERS = ("head", "head.fc", "classifier", "fc", "head.linear", "last_linear")
FINAL_PART = re.compile(r"(norm\d*|head|fc|classifier|last_linear)\.")


class FileWeights(NamedTuple):
    """Weights in a file, of the model, of the EMA or of both; names of the classes and scores if it has them."""

    model: Weights | None
    ema: Weights | None
    classes: list[str] | None
    scores: dict[str, float]

    @property
    def uses_ema(self) -> bool:
        """Whether the EMA's weights are the better ones by the file's own scores, or the only ones."""
        return self.ema is not None and (self.model is None or is_ema_better(self.scores))

    def chosen(self, source: str, *, ema: bool | None) -> dict[str, Weights]:
        """Return the weights by "model" and "EMA": both as far as there are, or of `ema` the EMA's or the model's.

        Raises:
            CheckpointError: the file, `source`, lacks those.
        """
        names = {None: ("model", "EMA"), True: ("EMA",), False: ("model",)}[ema]
        both = {"model": self.model, "EMA": self.ema}
        found = {name: weights for name in names if (weights := both[name]) is not None}
        if not found:
            raise lacking_weights(source, ema=bool(ema))
        return found


def read_weights(source: str | Path, *, tolerant: bool = False) -> FileWeights:
    """Read the weights of a file.

    Args:
        source: a path, a URL, or the name of released weights.
        tolerant: skip unknown objects beside the weights, which OpenMMLab's files have, instead of refusing the file.

    Raises:
        CheckpointError: the file cannot be read, or has no weights.
        DownloadError: the file of a URL cannot be downloaded.
    """
    content = load_checkpoint(source, tolerant=tolerant)
    weights = FileWeights(*find_weight_sets(content), classes_in(content), scores_in(content))
    if weights.model is None and weights.ema is None:
        raise no_weights_error(str(source), content)
    return weights


def read_state_dict(
    source: str | Path, *, ema: bool | None = None, announce: Callable[[str], None] = logger.info
) -> Weights:
    """Read the weights of a classifier, a detector or a segmentor, skipping unknown objects beside them.

    Args:
        source: a path, a URL, or the name of released weights.
        ema: True for the EMA's weights, False for the model's; None for the better ones by the file's own scores.
        announce: called with a line that says which of them.

    Returns:
        Tensors by name, on the CPU, without rotary tables, which follow from the image size.

    Raises:
        CheckpointError: the file cannot be read, or has no weights.
        DownloadError: the file of a URL cannot be downloaded.
    """
    content = load_checkpoint(source, tolerant=True)
    weights, description = choose_weights(content, str(source), ema=ema)
    if weights is not None:
        if description:
            announce(f"{source}: {description}")
        return {name: value for name, value in weights.items() if not name.endswith(DERIVED_KEY_SUFFIX)}
    raise no_weights_error(str(source), content)


def no_weights_error(source: str, content: dict[str, Any]) -> CheckpointError:
    """Return the error for a file without weights, which names the keys that it has."""
    present = ", ".join(map(str, list(content)[:MAX_KEYS_SHOWN])) or "nothing"
    keys = ", ".join((*MODEL_KEYS, *EMA_KEYS))
    return CheckpointError(f"{source}: no weights under {keys}, and not a bare state_dict; found {present}")


def classes_in(content: dict[str, Any]) -> list[str] | None:
    """Return the names of a file's classes in the order of the outputs, or None if it has none."""
    classes = content.get("classes")
    is_list = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return classes if is_list and classes else None


def metadata_in(content: dict[str, Any]) -> dict[str, Any]:
    """Return the class names, the configuration as YAML and the last scores, as far as a file has them."""
    metadata: dict[str, Any] = {}
    if classes := classes_in(content):
        metadata["classes"] = classes
    if isinstance(config := content.get("config"), dict):
        metadata["config"] = yaml.safe_dump(builtin_types(config))
    elif isinstance(config, str):
        metadata["config"] = config
    if "scores" in content:  # they decide between the model's weights and the EMA's
        metadata["scores"] = scores_in(content)
    return metadata


def builtin_types(value: Any) -> Any:
    """Convert nested settings to built-in types; values of other types become text."""
    if isinstance(value, dict):
        return {str(key): builtin_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [builtin_types(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def check_classes(
    stored: Sequence[str] | None, classes: Sequence[str], source: str | Path, *, num_outputs: int | None = None
) -> None:
    """Compare a file's classes with the data's; different names are a warning.

    Args:
        stored: names of the file's classes, if it has them.
        classes: names of the data's classes.
        source: the file's name, for messages.
        num_outputs: outputs of the model, of which the data's classes may be the first; by default one per class.

    Raises:
        CheckpointError: the numbers of classes differ.
    """
    if stored is None:
        return
    if len(stored) not in (len(classes), num_outputs):
        raise CheckpointError(
            f"{source}: was trained on {len(stored)} classes ({listed(stored, MAX_CLASSES_SHOWN)}), the data has "
            f"{len(classes)} ({listed(classes, MAX_CLASSES_SHOWN)}); use its own data, or --pretrained to fine-tune"
        )
    if changed := [f"{i} was {a}, is {b}" for i, (a, b) in enumerate(zip(stored, classes, strict=False)) if a != b]:
        logger.warning(
            "%s: was trained on other classes than the data has, %d of %d differ: %s",
            *(source, len(changed), len(classes), listed(changed, MAX_CLASSES_SHOWN)),
        )


def listed(items: Sequence[str], count: int) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def classifier_in(weights: Weights) -> str:
    """Return the name of the classifier's last layer, or an empty string if there is none, or one of uncommon name."""
    return next((name for name in CLASSIFIERS if f"{name}.weight" in weights), "")


def num_outputs(weights: Weights, classes: Sequence[str] | None = None) -> int | None:
    """Return the width of a classifier's last layer, or for one of uncommon name the number of the file's classes."""
    if name := classifier_in(weights):
        return len(weights[f"{name}.weight"])
    return len(classes) if classes else None


def load_weights(
    model: nn.Module,
    weights: Weights,
    source: str | Path,
    *,
    reinitialized: Collection[str] = (),
    unused: Collection[str] = (),
) -> None:
    """Load weights into a model; see `fitting_weights`."""
    model.load_state_dict(fitting_weights(model, weights, source, reinitialized=reinitialized, unused=unused))


def fitting_weights(
    model: nn.Module,
    weights: Weights,
    source: str | Path,
    *,
    reinitialized: Collection[str] = (),
    unused: Collection[str] = (),
) -> Weights:
    """Return weights that fit a model, every one of them; rotary tables, which are derived data, are skipped.

    Args:
        model: the network.
        weights: tensors by name.
        source: the file's name, for messages.
        reinitialized: modules of the model that may keep their own weights, where the file's are missing or do not fit.
        unused: modules in the file that the model may lack.

    Raises:
        CheckpointError: names, shapes or types do not fit; gives their number, and the first of each.
    """
    own = model.state_dict()
    weights = {
        name: value
        for name, value in weights.items()
        if not name.endswith(DERIVED_KEY_SUFFIX) and not (is_within(name, unused) and name not in own)
    }
    for name in own:
        fits = name in weights and weights[name].shape == own[name].shape
        if is_within(name, reinitialized) and not fits:
            weights[name] = own[name]
    shared = [name for name in own if name in weights]
    misshapen = [name for name in shared if weights[name].shape != own[name].shape]
    problems = {
        "missing": [name for name in own if name not in weights],
        "not in the model": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} where the model has {tuple(own[name].shape)}" for name in misshapen
        ],
        "of another type": [
            f"{name} {described_type(weights[name])} where the model has {described_type(own[name])}"
            for name in shared
            if not is_convertible(weights[name], own[name])
        ],
    }
    if any(problems.values()):
        num_shown = 2 if sum(map(bool, problems.values())) == 1 else 1  # of each, so that the line stays readable
        counts = "; ".join(f"{len(p)} {what}: {listed(p, num_shown)}" for what, p in problems.items() if p)
        remedy = "Use the --cfg that it was trained with"
        head = classifier_in(own)
        only_head = sum(map(len, problems.values())) == 2 and misshapen == [f"{head}.weight", f"{head}.bias"]
        if only_head and (width := len(weights[f"{head}.bias"])) > len(own[f"{head}.bias"]):
            remedy = f"Set MODEL.NUM_CLASSES {width} to evaluate it, or use --pretrained to fine-tune it"
        if prefixes := prefixes_of(weights, own):
            remedy = f"Its names have the prefix {' or '.join(map(repr, prefixes))}; save the weights of one without it"
        raise CheckpointError(f"{source}: does not fit the model. {counts}. {remedy}")
    return weights


def prefixes_of(weights: Weights, own: Weights) -> list[str]:
    """Return the prefixes with which most of the model's own names are among the file's."""
    probe = next(iter(own))
    prefixes = [name.removesuffix(probe) for name in weights if name.endswith(f".{probe}")]
    return [prefix for prefix in prefixes if sum(prefix + name in weights for name in own) > len(own) / 2]


def is_within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def load_pretrained(model: nn.Module, source: str | Path, classes: Sequence[str] | None = None) -> None:
    """Initialize a model from a file's weights, the EMA's if they are better; the log says what is not from the file.

    The classifier is re-initialized if the file has none, or one of another number of classes. A position table of
    another image size is resized bicubically. From a detector or segmentor the backbone is taken. Between a classifier
    (`norm`, `head`) and a dense backbone (`norm0`, `norm1`, ...) these final parts are not transferred.

    Args:
        model: a classifier or a dense backbone.
        source: a path, a URL, or the name of released weights.
        classes: the data's classes, to compare with the file's.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit.
        DownloadError: the file of a URL cannot be downloaded.
    """
    file = read_weights(source, tolerant=True)
    weights = (file.ema if file.uses_ema else file.model) or {}
    own = model.state_dict()
    logger.info("weights from %s%s", source, " (EMA)" if file.uses_ema else "")
    if any(name.startswith("backbone.") for name in weights):
        weights = {n.removeprefix("backbone."): value for n, value in weights.items() if n.startswith("backbone.")}
        logger.info("the file has a detector or segmentor; its backbone is used")
    unused = final_parts(weights) - final_parts(own)
    reinitialized = (
        final_parts(own) - final_parts(weights) if is_dense(weights) != is_dense(own) else {"head"} & {*unused}
    )
    head, widths = classifier_in(own), (num_outputs(weights), num_outputs(own))
    if head and f"{head}.weight" not in weights:
        reinitialized |= {head}
    elif head and widths[0] != widths[1]:
        reinitialized |= {head}
        logger.info("the file has %d classes, the data %d", *widths)
    elif file.classes and classes:
        check_classes(file.classes, classes, source)
    if reinitialized:
        logger.info("not from the file, re-initialized: %s", ", ".join(sorted(reinitialized)))
    if unused:
        logger.info("in the file and not used: %s", ", ".join(sorted(unused)))
    load_weights(model, with_resized_tables(weights, own, source), source, reinitialized=reinitialized, unused=unused)


def is_dense(weights: Weights) -> bool:
    """Return whether the weights are those of a dense backbone."""
    return "norm0.weight" in weights


def final_parts(weights: Weights) -> set[str]:
    """Return the names of the modules with weights in which a classifier and a dense backbone differ."""
    return {name.split(".")[0] for name in weights if FINAL_PART.match(name)}


def with_resized_tables(weights: Weights, own: Weights, source: str | Path) -> Weights:
    """Return the weights with position tables (1, N, E), of the model or its blocks, resized to the model's grid."""
    resized = {}
    for name in (name for name in own if name.endswith(POSITION_TABLE) and name in weights):
        table, target = weights[name], own[name]
        if table.shape == target.shape or table.ndim != 3:
            continue
        side, new_side = int(table.shape[1] ** 0.5), int(target.shape[1] ** 0.5)
        if side * side != table.shape[1] or table.shape[2] != target.shape[2]:
            continue  # another architecture, which load_weights reports
        logger.info("%s: position table resized from %dx%d to %dx%d tokens", source, side, side, new_side, new_side)
        resized[name] = resample_abs_pos_embed(
            table, [new_side, new_side], [side, side], num_prefix_tokens=0, interpolation="bicubic", antialias=False
        )
    return {**weights, **resized}

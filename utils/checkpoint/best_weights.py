"""Which weights are the best, of several epochs, and of the model and its EMA: the rules of all commands."""

import math
import sys
from argparse import BooleanOptionalAction
from collections.abc import Mapping
from typing import Any

from utils.checkpoint.weight_sets import Weights, find_weight_sets
from utils.checkpoint.weights_file import CheckpointError
from utils.config.command_line import Parser


def score_in(metrics: Mapping[str, float], name: str) -> float:
    """Return the metric by which weights are compared; NaN if any is not finite, as of weights that have diverged."""
    return float(metrics[name]) if all(map(math.isfinite, metrics.values())) else math.nan


def is_new_best(score: float, best: float) -> bool:
    """Return whether a later epoch's score takes the place of the best so far: also if they are equal, never if NaN."""
    return score >= best


def is_ema_better(scores: Mapping[str, float]) -> bool:
    """Return whether to use the EMA's weights, by the scores of "model" and "EMA"; also with equal or no scores.

    NaN, the score of weights that have diverged, is the worst.
    """
    model, ema = ((-math.inf if math.isnan(s) else s) for s in (scores.get("model", 0.0), scores.get("EMA", 0.0)))
    return ema >= model


def scores_in(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores by "model" and "EMA" of a checkpoint's last evaluation, {} if it has none.

    Files without them, such as the official code's, have the best scores up to then, which stand in.
    """
    scores = content.get("scores") or {"model": content.get("max_accuracy"), "EMA": content.get("max_accuracy_e")}
    is_complete = isinstance(scores, dict) and all(isinstance(scores.get(k), int | float) for k in ("model", "EMA"))
    return {name: float(scores[name]) for name in ("model", "EMA")} if is_complete else {}


def describe_choice(name: str, scores: Mapping[str, float]) -> str:
    """Return for example "EMA weights (score of the model 91.20, of the EMA 92.50)", or with one score its value."""
    if len(scores) == 2:
        return f"{name} weights (score of the model {scores['model']:.2f}, of the EMA {scores['EMA']:.2f})"
    return f"{name} weights" + "".join(f" (score {score:.2f})" for score in scores.values())


def choose_weights(content: Mapping[str, Any], source: str, *, ema: bool | None = None) -> tuple[Weights | None, str]:
    """Return the better of the model's and the EMA's weights in a file's content, and a line that says which.

    Without weights they are None. The line is empty where there is no choice.

    Args:
        content: of the file.
        source: its name, for messages.
        ema: True for the EMA's, False for the model's; None for the better ones by the file's own scores.

    Raises:
        CheckpointError: the file lacks the weights that `ema` asks for.
    """
    sets, scores = find_weight_sets(content), scores_in(content)
    if sets.model is None or sets.ema is None:
        wanted = {True: sets.ema, False: sets.model, None: sets.ema or sets.model}[ema]
        if wanted is None and sets != (None, None):
            raise lacking_weights(source, ema=bool(ema))
        return wanted, ""
    takes_ema = is_ema_better(scores) if ema is None else ema
    return (sets.ema if takes_ema else sets.model), describe_choice("EMA" if takes_ema else "model", scores)


def lacking_weights(source: str, *, ema: bool) -> CheckpointError:
    """Return the error for a file without the weights that --ema or --no-ema asks for."""
    flag, kind = ("--ema", "EMA") if ema else ("--no-ema", "model")
    return CheckpointError(f"{source}: has no {kind} weights; leave out {flag}")


def print_choice(text: str) -> None:
    """Print which weights a command uses, if there was a choice, on standard error."""
    if text:
        print(text, file=sys.stderr)


def add_ema_flag(parser: Parser) -> None:
    """Add --ema and --no-ema; `ema` is None if neither is typed."""
    parser.add_argument(
        "--ema",
        action=BooleanOptionalAction,
        help="use the EMA's weights, or with --no-ema the model's; by default the better by the file's own scores",
    )

"""The last lines of a run's log: the best scores, the file that has the better weights, and what to do with it."""

import shlex
from pathlib import Path

from torch import nn

from utils.checkpoint.files import checkpoints_in
from utils.logs.logger import errors_logged, logger
from utils.training.task import Run, Task
from utils.training.train_state import Best, TrainState


def draw_predictions(task: Task, run: Run, model: nn.Module, weights: str) -> Path:
    """Draw a model's predictions for validation images into the output folder; `weights` describes the model's."""
    path = task.draw_predictions(run, model, f"{run.config.MODEL.NAME}: {weights}")
    logger.info("predictions are drawn by the %s", weights)
    return path


def log_results(task: Task, run: Run, state: TrainState) -> None:
    """Log the best scores, and the next commands to paste; draw predictions if they are missing."""
    if not any(run.folder.glob("predictions.*")):
        with errors_logged("predictions could not be drawn"):
            draw_predictions(task, run, *state.better_model())
    scores = {"model": state.best} | ({"EMA": state.best_ema} if state.ema else {})
    described = [
        f"{name} {score:.3f}" + (f" (epoch {epoch})" if (epoch := state.best_epochs.get(name)) else "")
        for name, score in scores.items()
    ]
    weights = best_file(task, run.folder, state.best_so_far())
    logger.info("best %s: %s", task.metric_label, ", ".join(described))
    logger.info("results are in %s: metrics.jsonl, curves.png, predictions, checkpoints", run.folder)
    if weights is not None:
        commands = "\n".join(next_commands(task, run, weights))
        logger.info("the better weights are in %s; to use them:\n%s", weights, commands)


def best_file(task: Task, folder: Path, best: Best) -> Path | None:
    """Return the checkpoint of the best epoch; the newest one if that is in the folder of an earlier run."""
    path = folder / f"max_{'ema_' if best.is_ema else ''}{task.best_name}.pth"
    return path if path.is_file() else next((path for _, path in checkpoints_in(folder)), None)


def next_commands(task: Task, run: Run, weights: Path) -> list[str]:
    """Return commands that predict, export and report, ready to paste; IMAGE stands where the data has no files."""
    image = run.data.example_image or "IMAGE"
    commands: dict[str, list[object]] = {
        task.predict_command: [image, "--weights", weights, "--output", run.folder / "predictions"],
        "python -m utils.export": [run.folder / "model.onnx", "--weights", weights, "--to", "onnx"],
        "python -m utils.report": [run.folder],
    }
    return [f"{command} {shlex.join(map(str, args))}" for command, args in commands.items()]

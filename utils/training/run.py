"""The run of every task: command line mode, set-up, training, and evaluation of a checkpoint."""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from utils.checkpoint.best_weights import describe_choice, is_ema_better
from utils.checkpoint.weights import check_classes, load_weights, read_weights
from utils.config.command_line import report_user_errors
from utils.config.errors import ConfigError
from utils.config.schema import with_setting
from utils.config.standard_streams import print_error
from utils.distributed.process import Process, is_program
from utils.logs.logger import logger
from utils.logs.output_dir import lock_output_dir, open_output_dir, output_errors
from utils.logs.process_clock import StartClock, launch_seconds
from utils.speed.set_up import loading_cuda_libraries
from utils.training.build import (
    build_inference_model,
    build_precision,
    compile_setting,
    describe_out_of_memory,
)
from utils.training.determinism import use_deterministic_algorithms
from utils.training.launch import LaunchedProcess, explain_missing_compiler
from utils.training.results import draw_predictions, log_results
from utils.training.task import Run, Task
from utils.training.train_state import seed_everything
from utils.training.training_run import Training


def run_task(task: Task, config: CfgNode, *, run_throughput: Callable[[Task, CfgNode, Process], None]) -> int:
    """Train, evaluate, time or profile a model, as the configuration says. Returns the exit code."""
    if config.PROFILE_MODE:
        with report_user_errors(task.user_errors):
            print_error(f"counting parameters and MACs of {config.MODEL.NAME}, in seconds, or a minute for a detector")
            print(task.profile(config))
        return 0
    start = StartClock(launch_seconds() if is_program.is_set() else None)
    if config.TRAIN.DETERMINISTIC:
        use_deterministic_algorithms()
    launched = LaunchedProcess(
        config.LOCAL_RANK,
        user_errors=task.user_errors,
        explain_out_of_memory=lambda error: describe_out_of_memory(task, config, error),
    )
    with launched as process, explain_missing_compiler(compile_setting(config)):
        with report_user_errors(task.user_errors):
            task.check_kernels(config, process.device)
        start.end("GPU and process group")
        if config.THROUGHPUT_MODE:
            run_throughput(task, config, process)
        elif config.EVAL_MODE:
            run_evaluation(task, config, process)
        else:
            run_training(task, config, process, start)
    return launched.exit_code


def run_evaluation(task: Task, config: CfgNode, process: Process) -> None:
    """Evaluate the weights of MODEL.RESUME: the model's and the EMA's if the file has both, or those of EVAL_EMA."""
    with report_user_errors(task.user_errors, out_of_memory=False):
        if not config.MODEL.RESUME:
            message = "MODEL.RESUME is empty: evaluation needs weights, name them with --resume FILE"
            raise ConfigError(message, key="MODEL.RESUME")
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        config = choose_evaluation_precision(config)
        run = open_run(task, config, process, folder)
        logger.info("Evaluation in %s", run.precision.name)
        weights_file = read_weights(config.MODEL.RESUME, tolerant=True)
        num_outputs = config.MODEL.get("NUM_CLASSES")
        check_classes(weights_file.classes, run.data.classes, config.MODEL.RESUME, num_outputs=num_outputs)
        candidates = weights_file.chosen(config.MODEL.RESUME, ema=config.EVAL_EMA)
        first, *others = candidates
        models = {first: run.model} | {name: copy.deepcopy(run.model) for name in others}
        for name, model in models.items():
            load_weights(model, candidates[name], config.MODEL.RESUME)
    prepared = build_inference_model(task, config, process.device).together(models)
    scores = {name: metrics[task.metric] for name, metrics in task.evaluate(run, prepared).items()}
    if process.is_main:
        best = first if len(scores) == 1 else "EMA" if is_ema_better(scores) else "model"
        with output_errors(run.folder):
            draw_predictions(task, run, prepared[best], describe_choice(best, scores))


def choose_evaluation_precision(config: CfgNode) -> CfgNode:
    """Return the configuration for evaluation in float32, as published results are, unless AMP_DTYPE names a dtype."""
    if not config.AMP or config.AMP_DTYPE != "auto":
        return config
    logger.info("--eval does not use --amp; add --opts AMP_DTYPE bfloat16 (or float16) to evaluate in mixed precision")
    return with_setting(config, "AMP", False)


def run_training(task: Task, config: CfgNode, process: Process, start: StartClock) -> None:
    """Train from the newest checkpoint in the output folder, if any, to the last epoch."""
    with report_user_errors(task.user_errors, out_of_memory=False):
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        lock = lock_output_dir(folder) if process.is_main else None
    with lock or nullcontext():
        with report_user_errors(task.user_errors, out_of_memory=False):
            with loading_cuda_libraries(process.device):
                run = open_run(task, config, process, folder, start, tests_kernels=False)
                training = Training(task, run)
            start.end("model")
        if training.is_complete:
            logger.info("this run is complete; to train longer raise its length, for another run name another --tag")
        elif not (trainer := training.make_trainer(lock.check if lock else lambda: None)).run():  # asked to stop
            code = trainer.stop.cause.exit_code(process.num_processes)
            process.limit_stop(code)
            if code:
                sys.exit(code)
            return
        if process.is_main:
            log_results(task, run, training.state)


def open_run(
    task: Task,
    config: CfgNode,
    process: Process,
    folder: Path,
    start: StartClock | None = None,
    *,
    tests_kernels: bool = True,
) -> Run:
    """Open the data and make the model.

    Args:
        task: the task.
        config: the configuration.
        process: this process.
        folder: the output folder.
        start: counts the seconds of the start.
        tests_kernels: as for `prepare_model`.
    """
    start = start or StartClock()
    data = task.build_data(config, process)
    start.end("data")
    model = prepare_model(task, config, process, len(data.classes), tests_kernels=tests_kernels)
    precision = build_precision(config, process.device)
    if precision.dtype is torch.float16 and process.device.type == "cpu" and process.is_main:
        logger.warning("AMP_DTYPE float16: a CPU takes several times as long as for float32; use bfloat16, or no AMP")
    return Run(config, process, folder, data, model, precision, start)


def prepare_model(
    task: Task, config: CfgNode, process: Process, num_classes: int | None, *, tests_kernels: bool = True
) -> nn.Module:
    """Return the model on the device, with weights that SEED determines; then seed each process differently.

    Without `tests_kernels`, the caller has to test the kernels before the first forward pass.
    """
    seed_everything(config.SEED)
    model = task.build_model(config, process, num_classes).to(process.device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if tests_kernels:
        task.test_kernels(config, model, build_precision(config, process.device).dtype)
    seed_everything(config.SEED + process.rank)
    torch.backends.cudnn.benchmark = task.has_one_image_size and not config.TRAIN.DETERMINISTIC
    return model

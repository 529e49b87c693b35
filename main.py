"""Train, evaluate, time or profile a model from a YAML file, as one process or many.

python main.py --cfg cfgs/digits.yaml --amp
torchrun --nproc_per_node=8 main.py --cfg cfgs/mlla_t.yaml --data-path imagenet --output out --amp
python main.py --cfg cfgs/mlla_t.yaml --data-path imagenet --eval --resume mlla_t.pth
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from config import SCHEMA, ConfigError, Derived, derive, load_config
from data import Data, build_data, build_targets
from data.transforms import denormalize
from models import PAPER_PROFILES, build_model, input_channels, prepare_for_inference
from models.kernels.self_test import run_self_test
from utils.benchmark.throughput import run_benchmark
from utils.checkpoint.files import Progress
from utils.checkpoint.weights import check_classes, load_pretrained, load_weights, read_weights
from utils.config.command_line import parse_command_line, report_user_errors
from utils.distributed.process import Process, wrap_ddp
from utils.logs.environment import record_environment
from utils.logs.logger import logger
from utils.logs.output_dir import lock_output_dir, move_replaced_checkpoints, open_output_dir, save_config
from utils.logs.plots import CLASSIFIER_PANELS, plot_predictions
from utils.logs.wandb_logger import WandbLogger
from utils.speed.compile import compile_for_inference, resolve_mode
from utils.speed.flops import profile, profile_table
from utils.training.amp import Precision
from utils.training.build import (
    build_ema,
    build_optimizer,
    build_precision,
    build_tracker,
    build_train_step,
    build_trainer_config,
    compile_setting,
    describe_out_of_memory,
)
from utils.training.launch import run_process
from utils.training.train_state import TrainState, seed_everything
from utils.training.train_step import evaluate
from utils.training.trainer import Trainer

IMAGENET_IMAGES = 1_281_167  # of the run whose training step is measured


def main(argv: Sequence[str] | None = None) -> int:
    with report_user_errors():
        config = load_config(*parse_command_line(__doc__, argv, schema=SCHEMA))
    if config.PROFILE_MODE:
        return run_profile(config)
    work = run_throughput if config.THROUGHPUT_MODE else run_evaluation if config.EVAL_MODE else run_training
    return run_process(
        lambda process: work(config, process),
        config.LOCAL_RANK,
        compile_setting=compile_setting(config),
        explain_out_of_memory=partial(describe_out_of_memory, config),
    )


def run_profile(config: CfgNode) -> int:
    with report_user_errors():
        model = build_model(config)
    figures = PAPER_PROFILES.get(config.MODEL.NAME) if config.DATA.IMG_SIZE == 224 else None
    parts = profile(model, config.DATA.IMG_SIZE, input_channels(config))
    print(f"{config.MODEL.NAME}, {config.DATA.IMG_SIZE}x{config.DATA.IMG_SIZE}")
    print(profile_table(parts, (figures.parameters_m, figures.gmacs) if figures else None))
    return 0


def run_throughput(config: CfgNode, process: Process) -> int:
    with report_user_errors():
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        run_benchmark(
            config,
            process,
            folder,
            make_model=lambda: prepare_model(config, process, num_classes=None),
            prepare=prepare_for_inference,
            in_chans=input_channels(config),
            derived=derive(config, num_processes=process.num_processes, num_train_images=IMAGENET_IMAGES),
        )
    return 0


def run_evaluation(config: CfgNode, process: Process) -> int:
    with report_user_errors():
        if not config.MODEL.RESUME:
            raise ConfigError("MODEL.RESUME is empty: evaluation needs weights, name them with --resume FILE")
        open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        data = build_data(config, rank=process.rank, num_processes=process.num_processes, device=process.device)
        model = prepare_model(config, process, len(data.classes))
        weights_file = read_weights(config.MODEL.RESUME)
        check_classes(weights_file.classes, data.classes, config.MODEL.RESUME)
        found = {"model": weights_file.model, "EMA": weights_file.ema}
        for weights in filter(None, found.values()):
            load_weights(model, weights, config.MODEL.RESUME)  # that both fit is known before either is evaluated
    precision = build_precision(config, process.device)
    mode = resolve_mode(config.TEST.COMPILE, process.device)
    for name, candidate in found.items():
        if candidate is not None:
            load_weights(model, candidate, config.MODEL.RESUME)
            runner = model if mode == "off" else prepare_for_inference(model, precision.dtype)
            runner = compile_for_inference(runner, mode, process.device)
            log_scores(name, evaluate(runner, data.val, process, precision)._asdict())
    return 0


@dataclass
class Run:
    """What a training run consists of."""

    config: CfgNode
    process: Process
    folder: Path
    data: Data
    derived: Derived
    precision: Precision
    state: TrainState
    tracker: WandbLogger | None

    @property
    def uses_mesa(self) -> bool:
        return self.config.AUG.MESA > 0 and self.config.EMA.ENABLED


def run_training(config: CfgNode, process: Process) -> int:
    with report_user_errors():
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        lock = lock_output_dir(folder) if process.is_main else nullcontext()
    with lock:
        with report_user_errors():
            run = set_up(config, process, folder)
        is_complete = run.state.progress.epochs >= run.derived.total_epochs
        if is_complete:
            logger.info("this run is complete; for more raise TRAIN.EPOCHS, for another run name another --tag")
        elif not train(run):
            return 0
        if process.is_main and not (folder / "predictions.png").exists():
            draw_predictions(run, run.state.ema.on(process.device) if run.state.ema else run.state.model.eval())
        log_results(run)
    return 0


def set_up(config: CfgNode, process: Process, folder: Path) -> Run:
    """Open the data, make the model, and go on from a checkpoint where there is one."""
    data = build_data(config, rank=process.rank, num_processes=process.num_processes, device=process.device)
    derived = derive(config, num_processes=process.num_processes, num_train_images=data.num_train_images)
    model = prepare_model(config, process, len(data.classes))
    if config.MODEL.PRETRAINED:
        load_pretrained(model, config.MODEL.PRETRAINED, data.classes)
    precision = build_precision(config, process.device)
    ema = build_ema(config, model, derived)
    optimizer = build_optimizer(config, model)
    state = TrainState(model, ema, optimizer, precision.scaler, process, images_per_step=derived.global_batch)
    state.progress, state.classes = Progress(config.TRAIN.START_EPOCH), data.classes
    continues = state.resume(folder, explicit=config.MODEL.RESUME, auto=config.TRAIN.AUTO_RESUME)
    tracker = None
    if process.is_main and state.progress.epochs < derived.total_epochs:
        save_config(folder, config.dump())
        move_replaced_checkpoints(folder, state.progress, continues=continues)
        record_environment(folder, process, epoch=state.progress.epochs)
        tracker = build_tracker(config, folder, continues=continues)
    return Run(config, process, folder, data, derived, precision, state, tracker)


def train(run: Run) -> bool:
    """Train to the end; False where the run was asked to stop before."""
    config, process, state, derived = run.config, run.process, run.state, run.derived
    loader = run.data.train
    assert loader is not None
    if process.is_main:
        log_plan(run)
    make_targets = build_targets(config, len(run.data.classes))
    model = wrap_ddp(state.model, process, find_unused_parameters=config.TRAIN.FIND_UNUSED_PARAMS)

    def batches(epoch: int, first: int) -> Iterator[Any]:
        loader.set_epoch(epoch, first * config.DATA.BATCH_SIZE)
        return (make_targets(*batch) for batch in loader)

    def evaluate_and_log(candidate: nn.Module, name: str) -> dict[str, float]:
        scores = evaluate(candidate, run.data.val, process, run.precision)._asdict()
        log_scores(name, scores)
        return {key: scores[key] for key in ("acc1", "acc5", "loss")}

    trainer = Trainer(
        build_trainer_config(config, derived, metric="acc1", panels=CLASSIFIER_PANELS),
        state,
        build_train_step(config, model, state.optimizer, state.ema, run.precision, derived),
        folder=run.folder,
        batches=batches,
        evaluate=evaluate_and_log,
        facts={"config": config.dump(), "classes": run.data.classes},
        illustrate=lambda candidate: draw_predictions(run, candidate),
        tracker=run.tracker,
    )
    return trainer.run()


def prepare_model(config: CfgNode, process: Process, num_classes: int | None) -> nn.Module:
    """The model with weights that SEED fixes, on the device; afterwards each process draws its own random numbers."""
    seed_everything(config.SEED)
    model = build_model(config, num_classes).to(process.device)
    model = model.to(memory_format=torch.channels_last)
    run_self_test(model, build_precision(config, process.device).dtype, config.DATA.IMG_SIZE)
    seed_everything(config.SEED + process.rank)
    torch.backends.cudnn.benchmark = True
    return model


def log_plan(run: Run) -> None:
    config, derived = run.config, run.derived
    num_parameters = sum(p.numel() for p in run.state.model.parameters())
    logger.info(
        "%s: %.2f M parameters, %d classes, %d training and %d validation images; %d process(es) on %s, %s",
        *(config.MODEL.NAME, num_parameters / 1e6, len(run.data.classes), run.data.num_train_images),
        *(run.data.num_val_images, run.process.num_processes, run.process.device, run.precision.name),
    )
    logger.info(
        "%d images a step, %d steps an epoch, epochs %d to %d; learning rate %.3e, EMA decay %s, MESA %s; output in %s",
        *(derived.global_batch, derived.steps_per_epoch, run.state.progress.epochs + 1, derived.total_epochs),
        *(derived.base_lr, f"{derived.ema_decay:.6f}" if config.EMA.ENABLED else "off"),
        f"{config.AUG.MESA} from epoch {derived.mesa_start_epoch + 1}" if run.uses_mesa else "off",
        run.folder,
    )
    left = derived.ema_decay**derived.schedule_steps  # the initial weights' share of the average at the end
    if config.EMA.ENABLED and left > 0.1:
        logger.warning("the EMA will still be %.0f%% initial weights at the end; lower --model-ema-decay", 100 * left)
    if config.AUG.MESA and not config.EMA.ENABLED:
        logger.warning("AUG.MESA %s is off: its teacher is the EMA model, and EMA.ENABLED is False", config.AUG.MESA)


def log_scores(name: str, scores: dict[str, float]) -> None:
    logger.info("%s on %d images, loss %.4f:", name, scores["num_images"], scores["loss"])
    logger.info(" * Acc@1 %.3f Acc@5 %.3f", scores["acc1"], scores["acc5"])


def log_results(run: Run) -> None:
    state = run.state
    logger.info("best top-1: model %.3f%s", state.best, f", EMA {state.best_ema:.3f}" if state.ema else "")
    logger.info("results are in %s: metrics.jsonl, curves.png, predictions.png, checkpoints", run.folder)


def draw_predictions(run: Run, model: nn.Module) -> Path:
    """predictions.png: validation images with their true and predicted classes."""
    device, classes, picture = run.process.device, run.data.classes, run.folder / "predictions.png"
    images, labels = run.data.preview(count=40)
    with torch.no_grad(), run.precision.autocast():
        probabilities = model(images.to(device)).float().softmax(dim=1).cpu()  # (N, classes)
    confidences, predictions = probabilities.max(dim=1)
    plot_predictions(
        denormalize(images).permute(0, 2, 3, 1).numpy(),
        labels=[classes[label] for label in labels],
        predictions=[classes[label] for label in predictions.tolist()],
        confidences=confidences.tolist(),
        path=picture,
    )
    return picture


if __name__ == "__main__":
    sys.exit(main())

"""Train, evaluate, time or profile a model from a YAML file, as one process or many.

python main.py --cfg cfgs/digits.yaml --amp
torchrun --nproc_per_node=8 main.py --cfg cfgs/mlla_t.yaml --data-path imagenet --output out --amp
python main.py --cfg cfgs/mlla_t.yaml --data-path imagenet --eval --resume mlla_t.pth
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from config import SCHEMA, ConfigError, Derived, derive, load_config
from data import Data, build_data, build_targets
from data.transforms import denormalise
from models import PAPER_FIGURES, build_model
from utils.amp import Precision
from utils.benchmark import compiled, measure_throughput, peak_memory_mib, throughput_table
from utils.build import build_ema, build_optimizer, build_precision, build_schedule, build_train_step
from utils.checkpoint import checkpoint_name, save_under_names
from utils.command_line import parse_command_line
from utils.distributed import Process, distribute, start_process, stop_process
from utils.engine import NonFiniteLossError, TrainStep, evaluate, train_one_epoch
from utils.logger import Progress, RunRecorder, append_records, logger
from utils.metrics import Scores
from utils.plots import plot_predictions
from utils.profiling import profile, profile_table
from utils.run_folder import open_run_folder, set_aside_checkpoints, write_config
from utils.run_state import RunState, seed_everything
from utils.weights import load_pretrained, load_weights, read_weights

SECOND_VOICE_SECONDS = 5.0


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """While a run is set up, what is wrong with its inputs ends it with one line and exit code 2.

    Of several processes the first speaks first; the launcher then ends the others, before they repeat it.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(SECOND_VOICE_SECONDS)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    with mistakes_in_one_line():
        config = load_config(*parse_command_line(__doc__, argv, keys=SCHEMA))
        process = start_process(config.LOCAL_RANK)
    try:
        if config.PROFILE_MODE:
            return run_profile(config)
        if config.THROUGHPUT_MODE:
            return run_throughput(config, process)
        if config.EVAL_MODE:
            return run_evaluation(config, process)
        return run_training(config, process)
    except KeyboardInterrupt:
        logger.warning("interrupted; the same command goes on from the newest checkpoint, if there is one")
        return 130
    finally:
        stop_process()


def run_profile(config: CfgNode) -> int:
    with mistakes_in_one_line():
        model = build_model(config)
    figures = PAPER_FIGURES.get(config.MODEL.NAME) if config.DATA.IMG_SIZE == 224 else None
    parts = profile(model, config.DATA.IMG_SIZE, config.MODEL.MLLA.IN_CHANS)
    print(f"{config.MODEL.NAME}, {config.DATA.IMG_SIZE}x{config.DATA.IMG_SIZE}")
    print(profile_table(parts, (figures.parameters_m, figures.gmacs) if figures else None))
    return 0


def run_throughput(config: CfgNode, process: Process) -> int:
    with mistakes_in_one_line():
        folder = open_run_folder(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        model = prepare_model(config, process, num_classes=None)
    result = measure_throughput(
        model,
        name=config.MODEL.NAME,
        device=process.device,
        precision=build_precision(config, process.device),
        batch_size=config.DATA.BATCH_SIZE,
        image_size=config.DATA.IMG_SIZE,
        in_chans=config.MODEL.MLLA.IN_CHANS,
        compile_mode=config.TEST.COMPILE,
    )
    if process.is_main:
        print(throughput_table(result))
        append_records(folder / "throughput.jsonl", [asdict(result)])
    return 0


def run_evaluation(config: CfgNode, process: Process) -> int:
    with mistakes_in_one_line():
        if not config.MODEL.RESUME:
            raise ConfigError("MODEL.RESUME is empty: evaluation needs weights, name them with --resume FILE")
        open_run_folder(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        data = build_data(config, rank=process.rank, num_processes=process.num_processes, device=process.device)
        model = prepare_model(config, process, len(data.classes))
        model_weights, ema_weights = read_weights(config.MODEL.RESUME)
        found = {"model": model_weights, "EMA": ema_weights}
        for weights in filter(None, found.values()):
            load_weights(model, weights, config.MODEL.RESUME)  # that both fit is known before either is evaluated
    precision = build_precision(config, process.device)
    runner = compiled(model, config.TEST.COMPILE)
    for name, candidate in found.items():
        if candidate is not None:
            load_weights(model, candidate, config.MODEL.RESUME)
            log_scores(name, evaluate(runner, data.val, process, precision))
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
    state: RunState

    @property
    def uses_mesa(self) -> bool:
        return self.config.AUG.MESA > 0 and self.config.EMA.ENABLED


def run_training(config: CfgNode, process: Process) -> int:
    with mistakes_in_one_line():
        run = set_up(config, process)
    state, derived = run.state, run.derived
    if state.next_epoch >= derived.total_epochs:
        logger.info("this run is complete; for more raise TRAIN.EPOCHS, for another run name another --tag")
        if process.is_main and not (run.folder / "predictions.png").exists():
            draw_predictions(run)
        log_results(run)
        return 0
    if process.is_main:
        log_plan(run)
    ddp_model = distribute(state.model, process, find_unused_parameters=config.TRAIN.FIND_UNUSED_PARAMS)
    train_step = build_train_step(config, ddp_model, state.optimizer, state.ema, run.precision)
    recorder = RunRecorder(run.folder, state.next_epoch) if process.is_main else None
    try:
        for epoch in range(state.next_epoch, derived.total_epochs):
            run_epoch(run, train_step, recorder, epoch)
    except NonFiniteLossError as error:
        if process.is_main:
            logger.error("%s", error)
        return 1
    if recorder is not None:
        recorder.close()
        draw_predictions(run)
    log_results(run)
    return 0


def set_up(config: CfgNode, process: Process) -> Run:
    """Open the data and the output folder, make the model, and go on from a checkpoint where there is one."""
    folder = open_run_folder(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
    data = build_data(config, rank=process.rank, num_processes=process.num_processes, device=process.device)
    assert data.train is not None
    derived = derive(config, num_processes=process.num_processes, num_train_images=data.num_train_images)
    model = prepare_model(config, process, len(data.classes))
    if config.MODEL.PRETRAINED:
        has_fresh_head = load_pretrained(model, config.MODEL.PRETRAINED)
        logger.info("weights from %s%s", config.MODEL.PRETRAINED, ", but for the head" if has_fresh_head else "")
    precision = build_precision(config, process.device)
    ema = build_ema(config, model, derived)
    optimizer = build_optimizer(config, model)
    state = RunState(model, ema, optimizer, precision.scaler, process, next_epoch=config.TRAIN.START_EPOCH)
    continues = state.resume(folder, explicit=config.MODEL.RESUME, auto=config.TRAIN.AUTO_RESUME)
    if process.is_main and state.next_epoch < derived.total_epochs:
        write_config(folder, config.dump())
        set_aside_checkpoints(folder, state.next_epoch, continues=continues)
    return Run(config, process, folder, data, derived, precision, state)


def run_epoch(run: Run, train_step: TrainStep, recorder: RunRecorder | None, epoch: int) -> None:
    """Train one epoch, evaluate model and EMA, write down figures and checkpoint."""
    config, process, derived, state = run.config, run.process, run.derived, run.state
    assert run.data.train is not None
    start = time.perf_counter()
    with Progress(epoch, derived.total_epochs, derived.steps_per_epoch, is_main=process.is_main) as progress:
        summary = train_one_epoch(
            train_step,
            run.data.train,
            epoch=epoch,
            steps=derived.steps_per_epoch,
            accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
            schedule=build_schedule(config, derived),
            make_targets=build_targets(config, len(run.data.classes)),
            use_mesa=run.uses_mesa and epoch >= derived.mesa_start_epoch,
            process=process,
            progress=progress,
            print_freq=config.PRINT_FREQ,
        )
    scores = evaluate(state.model, run.data.val, process, run.precision)
    log_scores("model", scores)
    ema_scores = None
    if state.ema is not None:
        ema_scores = evaluate(state.ema.on(process.device), run.data.val, process, run.precision)
        log_scores("EMA", ema_scores)
    if recorder is not None:
        recorder.add(
            {
                "epoch": epoch,
                "step": (epoch + 1) * derived.steps_per_epoch,
                "lr": summary.lr,
                "train_loss": summary.train_loss,
                "grad_norm": summary.grad_norm,
                "acc1": scores.acc1,
                "acc5": scores.acc5,
                "loss": scores.loss,
                "ema_acc1": ema_scores.acc1 if ema_scores else None,
                "ema_acc5": ema_scores.acc5 if ema_scores else None,
                "epoch_seconds": time.perf_counter() - start,
                "images_per_second": summary.images_per_second,
                "memory_mib": peak_memory_mib(process.device),
            }
        )
    finish_epoch(run, epoch, scores, ema_scores)
    if recorder is not None:
        recorder.draw_curves(is_last=epoch + 1 == derived.total_epochs)


def finish_epoch(run: Run, epoch: int, scores: Scores, ema_scores: Scores | None) -> None:
    """Note the best accuracies and save what is due: by SAVE_FREQ, the last epoch, and the best ones."""
    state, config = run.state, run.config
    state.next_epoch = epoch + 1
    names = []
    if state.next_epoch % config.SAVE_FREQ == 0 or state.next_epoch == run.derived.total_epochs:
        names.append(checkpoint_name(epoch))
    if scores.acc1 >= state.best_acc1:
        state.best_acc1 = scores.acc1
        names.append("max_acc.pth")
    if ema_scores is not None and ema_scores.acc1 >= state.best_ema_acc1:
        state.best_ema_acc1 = ema_scores.acc1
        names.append("max_ema_acc.pth")
    if names:
        content = state.capture(
            config=config.dump(), classes=run.data.classes, versions={"torch": str(torch.__version__)}
        )
        if run.process.is_main:
            save_under_names(run.folder, names, content)


def prepare_model(config: CfgNode, process: Process, num_classes: int | None) -> nn.Module:
    """The model with weights that SEED fixes, on the device; afterwards each process draws its own random numbers."""
    seed_everything(config.SEED)
    model = build_model(config, num_classes).to(process.device)
    model = model.to(memory_format=torch.channels_last)
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
        *(derived.global_batch, derived.steps_per_epoch, run.state.next_epoch + 1, derived.total_epochs),
        *(derived.base_lr, f"{derived.ema_decay:.6f}" if config.EMA.ENABLED else "off"),
        f"{config.AUG.MESA} from epoch {derived.mesa_start_epoch + 1}" if run.uses_mesa else "off",
        run.folder,
    )
    left = derived.ema_decay**derived.schedule_steps  # the initial weights' share of the average at the end
    if config.EMA.ENABLED and left > 0.1:
        logger.warning("the EMA will still be %.0f%% initial weights at the end; lower --model-ema-decay", 100 * left)
    if config.AUG.MESA and not config.EMA.ENABLED:
        logger.warning("AUG.MESA %s is off: its teacher is the EMA model, and EMA.ENABLED is False", config.AUG.MESA)


def log_scores(name: str, scores: Scores) -> None:
    logger.info("%s on %d images, loss %.4f:", name, scores.num_images, scores.loss)
    logger.info(" * Acc@1 %.3f Acc@5 %.3f", scores.acc1, scores.acc5)


def log_results(run: Run) -> None:
    state = run.state
    logger.info("best top-1: model %.3f%s", state.best_acc1, f", EMA {state.best_ema_acc1:.3f}" if state.ema else "")
    logger.info("results are in %s: metrics.jsonl, curves.png, predictions.png, checkpoints", run.folder)


def draw_predictions(run: Run) -> None:
    """predictions.png: validation images with their true and predicted classes, by the EMA model if there is one."""
    state, device, classes = run.state, run.process.device, run.data.classes
    model = state.ema.on(device) if state.ema else state.model.eval()
    images, labels = run.data.preview(count=40)
    with torch.no_grad(), run.precision.autocast():
        probabilities = model(images.to(device)).float().softmax(dim=1).cpu()  # (N, classes)
    confidences, predictions = probabilities.max(dim=1)
    plot_predictions(
        denormalise(images).permute(0, 2, 3, 1).numpy(),
        labels=[classes[label] for label in labels],
        predictions=[classes[label] for label in predictions.tolist()],
        confidences=confidences.tolist(),
        picture=run.folder / "predictions.png",
    )


if __name__ == "__main__":
    sys.exit(main())

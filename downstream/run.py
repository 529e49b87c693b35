"""Training and evaluation of dense tasks: what their main commands share beside the run loop of the trainer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from downstream.dense_config import REFERENCE_BATCH_SIZE
from models.kernels.self_test import run_self_test
from utils.checkpoint.weights import check_classes, load_pretrained, load_weights, read_weights
from utils.config.command_line import report_user_errors
from utils.config.errors import ConfigError
from utils.distributed.process import Process, wrap_ddp
from utils.logs.environment import record_environment
from utils.logs.logger import logger
from utils.logs.output_dir import lock_output_dir, move_replaced_checkpoints, open_output_dir, save_config
from utils.logs.plots import Panel
from utils.logs.wandb_logger import WandbLogger
from utils.speed.compile import compile_regions
from utils.speed.memory import out_of_memory_message
from utils.training.amp import Precision, make_precision
from utils.training.build import build_tracker
from utils.training.ema import ModelEma
from utils.training.optimizer import make_optimizer
from utils.training.recipe import WarmupSchedule, parameter_groups
from utils.training.train_state import TrainState, seed_everything
from utils.training.train_step import TrainStep
from utils.training.trainer import Trainer, TrainerConfig


class Data(Protocol):
    """What a task reads; `train`'s batch sampler has set_epoch(epoch, start_batch). None where only evaluated."""

    @property
    def train(self) -> DataLoader | None: ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def num_train_images(self) -> int: ...

    @property
    def num_val_images(self) -> int: ...


@dataclass
class Run:
    """What training or evaluation consists of."""

    config: Any
    process: Process
    folder: Path
    data: Any
    model: nn.Module
    precision: Precision
    tracker: WandbLogger | None = None


class Task(ABC):
    """Detection or segmentation: what differs between them.

    Attributes:
        metric: the figure whose highest value marks the best checkpoint.
        best_name: what that checkpoint is called: max_<best_name>.pth.
        panels: what curves.png shows.
    """

    metric: str
    best_name: str
    panels: Sequence[Panel]

    @abstractmethod
    def open_data(self, config: Any, process: Process) -> Data: ...

    @abstractmethod
    def build_model(self, config: Any, num_classes: int) -> nn.Module:
        """The model, with fresh weights; its `backbone` takes ImageNet's."""

    @abstractmethod
    def lengths(self, config: Any, num_train_images: int, images_per_step: int) -> tuple[int, int]:
        """(epochs, steps per epoch) of a run; an epoch is the stretch between two evaluations."""

    @abstractmethod
    def schedule(self, config: Any, base_lr: float, epochs: int, steps_per_epoch: int) -> WarmupSchedule: ...

    @abstractmethod
    def to_device(self, batch: Any, device: torch.device) -> Any:
        """A loader's batch, ready for `losses`."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """The terms of the loss by name, scalars."""

    @abstractmethod
    def evaluate(self, run: Run, model: nn.Module, name: str) -> dict[str, float]:
        """Figures of a model over the validation set, the same on all processes; logs them under `name`."""

    @abstractmethod
    def illustrate(self, run: Run, model: nn.Module) -> Path:
        """A picture of what the model finds in validation images, in the run's folder; on the first process."""


def run_evaluation(task: Task, config: Any, process: Process) -> int:
    """Evaluate the weights of --resume, the model's and the average's where the file has both."""
    with report_user_errors():
        if not config.MODEL.RESUME:
            raise ConfigError("MODEL.RESUME is empty: evaluation needs weights, name them with --resume FILE")
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        data = task.open_data(config, process)
        model = prepare_model(task, config, process, len(data.classes))
        weights_file = read_weights(config.MODEL.RESUME, tolerant=True)
        check_classes(weights_file.classes, data.classes, config.MODEL.RESUME)
        found = {"model": weights_file.model, "EMA": weights_file.ema}
        for weights in filter(None, found.values()):
            load_weights(model, weights, config.MODEL.RESUME)  # that both fit is known before either is evaluated
    run = Run(config, process, folder, data, model, precision_of(config, process))
    for name, candidate in found.items():
        if candidate is not None:
            load_weights(model, candidate, config.MODEL.RESUME)
            task.evaluate(run, model, name)
    if process.is_main:
        task.illustrate(run, model)
    return 0


def run_training(task: Task, config: Any, process: Process) -> int:
    """Train from wherever the run's folder is to the end."""
    with report_user_errors():
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        lock = lock_output_dir(folder) if process.is_main else nullcontext()
    with lock:
        with report_user_errors():
            run, state, plan = set_up(task, config, process, folder)
        if state.progress.epochs >= plan.total_epochs:
            logger.info("this run is complete; for more raise the length of training, or name another --tag")
            return 0
        trainer = Trainer(
            plan,
            state,
            build_step(task, run, state),
            folder=folder,
            batches=lambda epoch, first: batches_of(task, run, epoch, first),
            evaluate=lambda model, name: task.evaluate(run, model, name),
            facts={"config": config.dump(), "classes": run.data.classes},
            illustrate=lambda model: task.illustrate(run, model),
            tracker=run.tracker,
        )
        if trainer.run() and process.is_main:
            average = f", EMA {state.best_ema:.2f}" if state.ema else ""
            logger.info("best %s: model %.2f%s; results are in %s", task.metric, state.best, average, folder)
    return 0


def set_up(task: Task, config: Any, process: Process, folder: Path) -> tuple[Run, TrainState, TrainerConfig]:
    """Open the data, make the model, and go on from a checkpoint where there is one."""
    data = task.open_data(config, process)
    images_per_step = config.DATA.BATCH_SIZE * process.num_processes * config.TRAIN.ACCUMULATION_STEPS
    epochs, steps_per_epoch = task.lengths(config, data.num_train_images, images_per_step)
    schedule = task.schedule(
        config, config.TRAIN.BASE_LR * images_per_step / REFERENCE_BATCH_SIZE, epochs, steps_per_epoch
    )
    model = prepare_model(task, config, process, len(data.classes))
    if config.MODEL.PRETRAINED:
        backbone: Any = model.backbone
        load_pretrained(getattr(backbone, "body", backbone), config.MODEL.PRETRAINED)
    precision = precision_of(config, process)
    decay = config.EMA.DECAY ** (images_per_step / REFERENCE_BATCH_SIZE)
    ema = ModelEma(model, decay, config.EMA.FORCE_CPU) if config.EMA.ENABLED else None
    settings = config.TRAIN.OPTIMIZER
    optimizer = make_optimizer(
        settings.NAME,
        parameter_groups(model, config.TRAIN.WEIGHT_DECAY),
        eps=settings.EPS,
        betas=settings.BETAS,
        momentum=settings.MOMENTUM,
    )
    state = TrainState(model, ema, optimizer, precision.scaler, process, images_per_step=images_per_step)
    state.classes = data.classes
    continues = state.resume(folder, explicit=config.MODEL.RESUME, auto=config.TRAIN.AUTO_RESUME)
    run = Run(config, process, folder, data, model, precision)
    if process.is_main and state.progress.epochs < epochs:
        save_config(folder, config.dump())
        move_replaced_checkpoints(folder, state.progress, continues=continues)
        record_environment(folder, process, epoch=state.progress.epochs)
        run.tracker = build_tracker(config, folder, continues=continues)
        log_plan(run, state, schedule, epochs, steps_per_epoch)
    return run, state, plan_of(task, config, schedule, epochs, steps_per_epoch)


def build_step(task: Task, run: Run, state: TrainState) -> TrainStep:
    """The training step; compiles the backbone's blocks where TRAIN.COMPILE says so."""
    config = run.config
    compile_regions(run.model.backbone, config.TRAIN.COMPILE)  # type: ignore[arg-type]
    network = wrap_ddp(run.model, run.process, find_unused_parameters=config.TRAIN.FIND_UNUSED_PARAMS)
    return TrainStep(
        network,
        state.optimizer,
        run.precision,
        compute_losses=lambda batch, _: task.losses(network, batch),
        clip_grad=config.TRAIN.CLIP_GRAD,
        ema=state.ema,
    )


def plan_of(task: Task, config: Any, schedule: WarmupSchedule, epochs: int, steps_per_epoch: int) -> TrainerConfig:
    return TrainerConfig(
        total_epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        lr_at=schedule.lr_at,
        metric=task.metric,
        best_name=task.best_name,
        panels=task.panels,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
        save_freq=config.SAVE_FREQ,
        save_steps=config.TRAIN.SAVE_STEPS,
        print_freq=config.PRINT_FREQ,
        stop_on_save_error=config.TRAIN.ON_SAVE_ERROR == "stop",
        save_in_background=config.TRAIN.SAVE_IN_BACKGROUND,
        picture_epochs=config.LOG.PICTURE_EPOCHS,
    )


def prepare_model(task: Task, config: Any, process: Process, num_classes: int) -> nn.Module:
    """The model with weights that SEED fixes, on the device; afterwards each process draws its own random numbers."""
    seed_everything(config.SEED)
    model = task.build_model(config, num_classes).to(process.device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run_self_test(model, precision_of(config, process).dtype, image_size=512)  # larger grids are in the same class
    seed_everything(config.SEED + process.rank)
    return model


def precision_of(config: Any, process: Process) -> Precision:
    return make_precision(process.device, amp=config.AMP, dtype=config.AMP_DTYPE)


def describe_out_of_memory(config: Any, error: torch.OutOfMemoryError) -> str:
    """One line with the batch that did not fit on the GPU and what to lower."""
    is_training = not config.EVAL_MODE  # which takes one image at a time
    return out_of_memory_message(
        error,
        work=f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE}" if is_training else "evaluation",
        batch_size=config.DATA.BATCH_SIZE if is_training else 1,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS if is_training else None,
        amp=config.AMP,
        can_recompute=config.MODEL.TYPE == "mlla" and not config.TRAIN.USE_CHECKPOINT,
        smaller="lower the sizes of images, AUG.* and TEST.*",
    )


def batches_of(task: Task, run: Run, epoch: int, first: int) -> Iterator[Any]:
    """This process's micro-batches of an epoch, on the device, from number `first` on."""
    run.data.train.batch_sampler.set_epoch(epoch, first)
    return (task.to_device(batch, run.process.device) for batch in run.data.train)


def log_plan(run: Run, state: TrainState, schedule: WarmupSchedule, epochs: int, steps_per_epoch: int) -> None:
    config, process = run.config, run.process
    logger.info(
        "%s: %.2f M parameters, %d classes, %d training and %d validation images; %d process(es) on %s, %s",
        *(config.MODEL.NAME, sum(p.numel() for p in run.model.parameters()) / 1e6, len(run.data.classes)),
        *(run.data.num_train_images, run.data.num_val_images, process.num_processes, process.device),
        run.precision.name,
    )
    logger.info(
        "%d images a step, %d steps an epoch, epochs %d to %d; learning rate %.3e, EMA %s; output in %s",
        *(state.images_per_step, steps_per_epoch, state.progress.epochs + 1, epochs, schedule.base_lr),
        *(f"{state.ema.decay:.6f}" if state.ema else "off", run.folder),
    )

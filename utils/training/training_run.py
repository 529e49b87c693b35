"""A training run: what it consists of, and what is prepared before its first step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from yacs.config import CfgNode

from utils.checkpoint.files import Progress, move_replaced_checkpoints
from utils.checkpoint.rng import restore_rng_state, rng_state
from utils.checkpoint.same_run import check_same_run
from utils.config.schema import with_setting
from utils.config.yaml_file import flatten
from utils.logs.environment import record_environment
from utils.logs.logger import logger
from utils.logs.output_dir import save_config
from utils.logs.wandb_logger import WandbLogger
from utils.speed.set_up import garbage_collection_paused
from utils.training.build import (
    build_ema,
    build_inference_model,
    build_optimizer,
    build_tracker,
    build_train_step,
    build_trainer_config,
)
from utils.training.derived import Derived, few_steps_warning
from utils.training.fused_update_support import UPDATE
from utils.training.graphed_step import GraphedTrainStep
from utils.training.memory_check import memory_warning
from utils.training.results import draw_predictions
from utils.training.task import Run, Schedule, Task
from utils.training.train_state import TrainState
from utils.training.train_step import TrainStep
from utils.training.trainer import Trainer

NOTICEABLE_INITIAL_SHARE = 0.1  # of the initial weights in the EMA at the end of a run


class Training:
    """A training run: optimizer, EMA and state, resumed from a checkpoint if there is one."""

    def __init__(self, task: Task, run: Run) -> None:
        config, process = run.config, run.process
        self.task, self.run = task, run
        self.derived: Derived = task.derive(
            config, num_processes=process.num_processes, num_train_images=run.data.num_train_images
        )
        self.schedule: Schedule = task.schedule(config, self.derived)
        ema = build_ema(config, run.model, self.derived)
        self.state = TrainState(
            run.model,
            ema,
            build_optimizer(config, task.parameter_groups(config, run.model)),
            run.precision.scaler,
            process,
            global_batch_size=self.derived.global_batch_size,
            num_train_images=run.data.num_train_images,
            steps_per_epoch=self.derived.steps_per_epoch,
        )
        self.state.progress, self.state.classes = Progress(config.TRAIN.START_EPOCH), run.data.classes
        continues = self.state.resume(
            run.folder,
            explicit=config.MODEL.RESUME,
            auto=config.TRAIN.AUTO_RESUME,
            check=lambda content, path: check_same_run(
                *(content, path, dict(flatten(config))),
                classes=run.data.classes,
                num_train_images=run.data.num_train_images,
            ),
        )
        self.rng = rng_state(process.device)  # of the first step
        if self.state.source:
            if config.MODEL.PRETRAINED:
                logger.info("%s, named by --pretrained, is not read: the run resumes", config.MODEL.PRETRAINED)
            # The record is of what the run did start from.
            config = run.config = with_setting(config, "MODEL.PRETRAINED", self.state.pretrained)
        elif config.MODEL.PRETRAINED:
            task.load_pretrained(run.model, config.MODEL.PRETRAINED, run.data.classes)
            if ema is not None:
                ema.module.load_state_dict(run.model.state_dict())
        self.tracker: WandbLogger | None = None
        if process.is_main and not self.is_complete:
            save_config(run.folder, config.dump())
            source = self.state.source
            move_replaced_checkpoints(run.folder, self.state.progress, continues=continues, source=source)
            record_environment(run.folder, process, epoch=self.state.progress.epochs)
            self.tracker = build_tracker(config, run.folder, continues=continues)
            self.log_start()

    @property
    def is_complete(self) -> bool:
        return self.state.progress.epochs >= self.derived.total_epochs

    def make_trainer(self, check_folder: Callable[[], object]) -> Trainer:
        task, run = self.task, self.run
        batches = self.start_loading()
        with garbage_collection_paused():
            step = self.prepare_step()
            as_compiled = build_inference_model(task, run.config, run.process.device)
            if task.has_one_image_size:
                as_compiled.warm_up(self.state.model, run.config, run.precision)
            run.start.end("evaluation's graph")

        def evaluate(models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
            with as_compiled:
                return task.evaluate(run, as_compiled.together(models))

        def draw(model: nn.Module, weights: str) -> Path:
            with as_compiled:
                return draw_predictions(task, run, as_compiled(model), weights)

        trainer = Trainer(
            build_trainer_config(task, run.config, self.derived, self.schedule),
            self.state,
            step,
            folder=run.folder,
            batches=batches,
            evaluate=evaluate,
            metadata={"config": run.config.dump(), "classes": run.data.classes},
            draw_predictions=draw,
            expect_epoch=lambda epoch: task.expect_epoch(run, epoch),
            # On a CPU, loading and training share the cores.
            loading_advice=run.data.loading_advice if run.process.device.type == "cuda" else None,
            tracker=self.tracker,
            check_folder=check_folder,
            start=run.start,
        )
        # What set-up draws (torch does for an all-reduce on the meta device) it draws at every start: it must not show.
        restore_rng_state(self.rng, run.process.device)
        return trainer

    def start_loading(self) -> Callable[[int, int], Iterator[Any]]:
        """Let the loader's workers begin, beside set-up and compilation; return the trainer's function `batches`."""
        task, run, progress = self.task, self.run, self.state.progress
        started: dict[tuple[int, int], Iterator[Any]] = {}
        if progress.steps < self.derived.steps_per_epoch:
            first = progress.epochs, progress.steps * run.config.TRAIN.ACCUMULATION_STEPS
            started[first] = task.batches(run, *first)
            run.start.end("loader workers")

        def batches(epoch: int, first: int) -> Iterator[Any]:
            return started.pop((epoch, first), None) or task.batches(run, epoch, first)

        return batches

    def prepare_step(self) -> TrainStep:
        """Return the compiled step, prepared while other processes test the kernels where these have to be compiled."""
        run = self.run
        steps: list[TrainStep] = []
        errors: list[Exception] = []
        # With several processes building measures all-reduces, which would be slower beside the tests.
        built = self.build_step() if run.process.num_processes > 1 else None

        def prepare() -> None:
            if steps or errors:
                return
            run.start.end("kernels")
            try:
                steps.append(built or self.build_step())
            except Exception as error:  # raised below: here it would count as one of the test's
                errors.append(error)
                return
            self.compile_ahead(steps[0])
            run.start.end("compiling")

        others = [] if run.config.MODEL.KERNELS == "torch" else [UPDATE]
        self.task.test_kernels(run.config, run.model, run.precision.dtype, prepare, others)
        prepare()
        if errors:
            raise errors[0]
        run.start.end("kernels")
        return steps[0]

    def compile_ahead(self, step: TrainStep) -> None:
        """Compile the step, if it is compiled; what fails here fails again, with its reason, in the first step."""
        run, (epochs, steps) = self.run, self.state.progress
        is_compiled = any(module._compiled_call_impl is not None for module in run.model.modules())
        may_wait = run.process.num_processes > 1 and self.task.compiled_module  # parts with batch norm of all processes
        if is_compiled and not may_wait and isinstance(step, GraphedTrainStep):
            with suppress(Exception):  # of torch.compile, of any type
                batch = self.task.synthetic_batch(run.config, run.model.train(), run.process.device)
                step.compile_ahead(batch, epochs * self.derived.steps_per_epoch + steps)

    def build_step(self) -> TrainStep:
        run, state, derived = self.run, self.state, self.derived
        parts = (run.config, run.model, run.process, state.optimizer, state.ema, run.precision, derived)
        step = build_train_step(self.task, *parts)
        run.start.end("training step")
        return step

    def log_start(self) -> None:
        config, run, derived = self.run.config, self.run, self.derived
        num_processes, num_images = run.process.num_processes, run.data.num_train_images
        logger.info(
            "Model %s: %.2f M parameters, %d classes; %d training and %d validation images; %d %s on %s, %s",
            *(config.MODEL.NAME, sum(p.numel() for p in run.model.parameters()) / 1e6, len(run.data.classes)),
            *(run.data.num_train_images, run.data.num_val_images, num_processes),
            *("process" if num_processes == 1 else "processes", run.process.device, run.precision.name),
        )
        logger.info(
            "Global batch size %d, %d steps/epoch, epochs %d to %d, lr %.3e, EMA decay %s%s; output in %s",
            *(derived.global_batch_size, derived.steps_per_epoch, self.state.progress.epochs + 1),
            *(derived.total_epochs, self.schedule.base_lr),
            describe_ema(config, derived),
            self.task.describe(config, derived),
            run.folder,
        )
        if few := few_steps_warning(config, derived, num_processes=num_processes, num_train_images=num_images):
            logger.warning("%s", few)
        if memory := memory_warning(self.task, run, derived):
            logger.warning("%s", memory)
        initial_share = 0 if derived.ema_warmup else derived.ema_decay**derived.total_steps
        if config.EMA.ENABLED and initial_share > NOTICEABLE_INITIAL_SHARE:
            logger.warning(
                "at the end the EMA will still contain %.0f%% of the initial weights; set EMA.WARMUP auto",
                100 * initial_share,
            )


def describe_ema(config: CfgNode, derived: Derived) -> str:
    """Return the decay of the EMA per step, for the log."""
    if not config.EMA.ENABLED:
        return "off"
    return f"{derived.ema_decay:.6f}{' with warm-up' if derived.ema_warmup else ''}"

"""Interface of a task: everything in which classification, detection and segmentation differ."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from yacs.config import CfgNode

from utils.checkpoint.weights import load_pretrained
from utils.config.errors import UserError
from utils.distributed.process import Process
from utils.logs.plots import Panel
from utils.logs.process_clock import StartClock
from utils.speed.compile import CapturedModel
from utils.speed.inference_graphs import Function
from utils.training.amp import Precision
from utils.training.derived import Derived, derive, steps_per_pass
from utils.training.ema import ModelEma
from utils.training.train_step import ComputeLosses


class Data(Protocol):
    """Loaders of a task; `train` is None for evaluation only."""

    @property
    def train(self) -> Any: ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def num_train_images(self) -> int: ...

    @property
    def num_val_images(self) -> int: ...

    @property
    def example_image(self) -> Path | None: ...  # file of a validation image, if it is one

    def loading_advice(self) -> str: ...  # how training images may be loaded faster, for a log line


class Schedule(Protocol):
    """Learning rate by optimizer step, with the scaled rate after warm-up."""

    @property
    def base_lr(self) -> float: ...

    def lr_at(self, step: int) -> float: ...


@dataclass
class Run:
    """The parts that training and evaluation share.

    Attributes:
        folder: the output folder.
        data: the task's own data.
        model: on the device.
        start: counts the seconds until the first step.
    """

    config: CfgNode
    process: Process
    folder: Path
    data: Any
    model: nn.Module
    precision: Precision
    start: StartClock = field(default_factory=StartClock)


class Task(ABC):
    """Base class of classification, detection and segmentation.

    Attributes:
        metric: key of `evaluate`'s result whose highest value marks the best checkpoint.
        metric_label: the metric's name in log lines.
        best_name: names the best checkpoint: max_<best_name>.pth.
        best_label: an epoch's log line "Max <best_label>: X%" has the best value so far; "": no such line.
        predict_command: command that predicts for images.
        panels: plots in curves.png.
        lr_batch_size: global batch size that TRAIN.BASE_LR is given for.
        ema_batch_size: global batch size that EMA.DECAY is given for.
        compiled_module: name of the submodule that is compiled; "": the model.
        auto_training_mode: compile mode that TRAIN.COMPILE auto stands for on a GPU.
        has_one_image_size: all training images have one size, for which cuDNN's algorithms are timed and code is
            compiled.
        smaller_images: remedy for running out of memory.
        user_errors: errors that a user can mend.
    """

    metric: str
    metric_label: str
    best_name: str
    best_label = ""
    predict_command: str
    panels: Sequence[Panel]
    lr_batch_size: int
    ema_batch_size: int
    compiled_module = ""
    auto_training_mode = "reduce-overhead"
    has_one_image_size = False
    smaller_images: str
    user_errors: tuple[type[Exception], ...] = (UserError,)

    @abstractmethod
    def build_data(self, config: CfgNode, process: Process) -> Data: ...

    @abstractmethod
    def build_model(self, config: CfgNode, process: Process, num_classes: int | None) -> nn.Module:
        """Return the model with newly initialized weights; without num_classes for the configured dataset."""

    def load_pretrained(self, model: nn.Module, source: str, classes: Sequence[str]) -> None:
        """Load the weights of MODEL.PRETRAINED."""
        load_pretrained(model, source, classes)

    def check_kernels(self, config: CfgNode, device: torch.device) -> None:  # noqa: B027
        """Raise one of `user_errors` if MODEL.KERNELS asks for GPU kernels that the device cannot run."""

    def record_inference(self, model: nn.Module, make: Callable[[Function], Function]) -> nn.Module:  # noqa: ARG002
        """Return a model in evaluation mode with CUDA graphs.

        Args:
            model: the model, which may be changed.
            make: makes graphs by shape of a function whose work depends on the shapes of its inputs alone.
        """
        return CapturedModel(model)

    def test_kernels(  # noqa: B027
        self,
        config: CfgNode,
        model: nn.Module,
        dtype: torch.dtype,
        meanwhile: Callable[[], object] | None = None,
        others: Sequence[str] = (),
    ) -> None:
        """Test the GPU kernels that a run uses, once its model is on the device, before its first forward pass.

        `meanwhile`, which compiles code with these kernels, is called while other processes test them. `others` are
        kernels of the training step, "module:name", where a module has find_error(name, device) and
        set_verdict(name, device, error).
        """

    def prepare_for_inference(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:  # noqa: ARG002
        """Return a model that computes the same faster in evaluation; used where TEST.COMPILE is not off."""
        return model

    @abstractmethod
    def parameter_groups(self, config: CfgNode, model: nn.Module) -> list[dict[str, Any]]: ...

    def lengths(self, config: CfgNode, num_processes: int, num_train_images: int) -> tuple[int, int]:
        """Return the number of epochs of a run, and of optimizer steps per epoch: by default passes over the data.

        Raises:
            ConfigError: the training set is too small for one step.
        """
        steps = steps_per_pass(config, num_processes=num_processes, num_train_images=num_train_images)
        return config.TRAIN.EPOCHS, steps

    def derive(self, config: CfgNode, *, num_processes: int, num_train_images: int) -> Derived:
        """Return the lengths and scaled rates of a run."""
        total_epochs, steps_per_epoch = self.lengths(config, num_processes, num_train_images)
        return derive(
            config,
            num_processes=num_processes,
            total_epochs=total_epochs,
            steps_per_epoch=steps_per_epoch,
            lr_batch_size=self.lr_batch_size,
            ema_batch_size=self.ema_batch_size,
        )

    @abstractmethod
    def schedule(self, config: CfgNode, derived: Derived) -> Schedule: ...

    @abstractmethod
    def batches(self, run: Run, epoch: int, first: int) -> Iterator[Any]:
        """Return this process's micro-batches of an epoch, on the device, from number `first` on."""

    def expect_epoch(self, run: Run, epoch: int) -> None:  # noqa: B027
        """Let loading of an epoch begin at the end of the evaluation before it; else it begins with `batches`."""

    def loading_choices(self, config: CfgNode, device: torch.device) -> list[dict[str, str]]:  # noqa: ARG002
        """Return settings, values by key, with which training from files is to be compared."""
        return [{}]

    @abstractmethod
    def losses(self, config: CfgNode, network: nn.Module, ema: ModelEma | None, derived: Derived) -> ComputeLosses:
        """Return a function from (micro-batch, step) to the terms of the loss by name, scalars.

        It calls `network`, the model. An attribute `variant(step)` declares that a step's work depends on its batch's
        shapes and on the variant only (see GraphedTrainStep).
        """

    def training_forward(self, config: CfgNode, model: nn.Module, derived: Derived) -> object:
        """Run a forward pass of training on a synthetic batch, as far as its activations take memory."""
        batch = self.synthetic_batch(config, model, next(model.parameters()).device)
        return self.losses(config, model, None, derived)(batch, 0)

    @abstractmethod
    def evaluate(self, run: Run, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
        """Return metrics of models over the validation set, in one pass over it; logs them.

        Args:
            run: the run; all its processes call together.
            models: in evaluation mode, by name. Getting one may end the validity of another, see `SharedModel`.

        Returns:
            Metrics by the models' names, the same on all processes.
        """

    @abstractmethod
    def draw_predictions(self, run: Run, model: nn.Module, title: str) -> Path:
        """Draw predictions for validation images into the output folder, under a title, and return the file.

        Called on the first process.
        """

    @abstractmethod
    def profile(self, config: CfgNode) -> str:
        """Return a table of parameters and MACs."""

    @abstractmethod
    def synthetic_batch(self, config: CfgNode, model: nn.Module, device: torch.device) -> Any:
        """Return a random micro-batch of DATA.BATCH_SIZE images on the device, as `batches` gives."""

    @abstractmethod
    def inference_call(
        self, config: CfgNode, model: nn.Module, batch_size: int, size: tuple[int, int], device: torch.device
    ) -> Callable[[], object]:
        """Return a function that computes a model's predictions for synthetic images of a size on the device."""

    @abstractmethod
    def image_size(self, config: CfgNode, *, training: bool) -> tuple[int, int]:
        """Return height and width of synthetic images."""

    def memory_request(self, config: CfgNode) -> tuple[str, int]:
        """Return a description of the work that needs a GPU's memory, and the number of images per forward pass."""
        return f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE}", config.DATA.BATCH_SIZE

    def describe(self, config: CfgNode, derived: Derived) -> str:  # noqa: ARG002
        """Return an addition to the log line that describes a run."""
        return ""

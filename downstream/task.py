"""Base of detection and segmentation as tasks: the backbone's compilation and weights, and the published recipe."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from models import prepare_for_inference
from models.kernels.dispatch import KernelsUnavailableError
from models.kernels.self_test import expect_self_test, run_self_test
from utils.checkpoint.weights import load_pretrained
from utils.config.errors import UserError
from utils.speed.inference_graphs import Function
from utils.training.build import model_uses
from utils.training.derived import Derived
from utils.training.ema import ModelEma
from utils.training.optimizer import dense_parameter_groups
from utils.training.task import Run, Task
from utils.training.train_step import ComputeLosses


class DenseLosses:
    """Losses of a micro-batch by name, as the task computes them."""

    def __init__(self, task: "DenseTask", config: CfgNode, network: nn.Module) -> None:
        self.task, self.config, self.network = task, config, network

    def __call__(self, batch: Any, _: int) -> Mapping[str, Tensor]:
        return self.task.batch_losses(self.config, self.network, batch)


class FixedShapeLosses(DenseLosses):
    """Losses whose work is the same in every step, so that a step can be one CUDA graph."""

    def variant(self, _: int) -> bool:
        """Return the variant of the loss in a step; there is one only."""
        return False


class DenseTask(Task):
    """A dense prediction task, whose model has a `backbone`.

    Attributes:
        kernels: names of its own kernels, for the self-test.
    """

    lr_batch_size = 16  # two images on each of 8 GPUs
    ema_batch_size = 16
    compiled_module = "backbone"
    losses_class = DenseLosses
    kernels: Sequence[str] = ()
    smaller_images = "lower the image sizes, AUG.* and TEST.*"
    user_errors = (UserError, KernelsUnavailableError)

    def load_pretrained(self, model: nn.Module, source: str, classes: Sequence[str]) -> None:  # noqa: ARG002
        """Load an ImageNet classifier's weights into the backbone."""
        backbone: Any = model.backbone
        load_pretrained(getattr(backbone, "body", backbone), source)

    def check_kernels(self, config: CfgNode, device: torch.device) -> None:
        expect_self_test(config.MODEL.KERNELS, device)

    def test_kernels(
        self,
        config: CfgNode,
        model: nn.Module,
        dtype: torch.dtype,
        meanwhile: Callable[[], object] | None = None,
        others: Sequence[str] = (),
    ) -> None:
        uses = model_uses(config, next(model.parameters()).device)
        others = [*others, *self.kernels] if others else []  # where the model is trained
        # Grids of larger images are in the same class.
        run_self_test(model, dtype, image_size=512, uses=uses, meanwhile=meanwhile, others=others)

    def record_inference(self, model: nn.Module, make: Callable[[Function], Function]) -> nn.Module:
        """Let the model's `record_inference` replace what it computes in fixed shapes."""
        model.record_inference(make)  # type: ignore[operator]
        return model

    def prepare_for_inference(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        return prepare_for_inference(model, dtype)

    def parameter_groups(self, config: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
        return dense_parameter_groups(model, config.TRAIN.WEIGHT_DECAY)

    @abstractmethod
    def to_device(self, batch: Any, device: torch.device) -> Any:
        """Return a loader's batch on the device, ready for `batch_losses`."""

    @abstractmethod
    def batch_losses(self, config: CfgNode, network: Callable[..., Any], batch: Any) -> Mapping[str, Tensor]:
        """Return the terms of the loss by name, scalars; `network` is the model, or computes the same."""

    def batches(self, run: Run, epoch: int, first: int) -> Iterator[Any]:
        run.data.train.batch_sampler.set_epoch(epoch, first)
        return (self.to_device(batch, run.process.device) for batch in run.data.train)

    def expect_epoch(self, run: Run, epoch: int) -> None:
        run.data.train.batch_sampler.set_epoch(epoch)
        run.data.train.start_after(run.data.val)

    def losses(
        self,
        config: CfgNode,
        network: nn.Module,
        ema: ModelEma | None,  # noqa: ARG002
        derived: Derived,  # noqa: ARG002
    ) -> ComputeLosses:
        return self.losses_class(self, config, network)

    def memory_request(self, config: CfgNode) -> tuple[str, int]:
        return ("evaluation", 1) if config.EVAL_MODE else super().memory_request(config)

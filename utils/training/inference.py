"""The model that evaluations run: prepared and compiled once, for the weights of several models in turn."""

from typing import Any

import torch
from torch import Tensor, nn

from utils.speed.compile import compile_for_inference, uses_graphs
from utils.training.amp import Precision
from utils.training.task import Task


class InferenceModel:
    """Gives models as TEST.COMPILE has them: prepared and compiled, or unchanged for "off".

    The models must have one architecture. Only the first is compiled and captured; later ones hand it their weights.

    Args:
        task: prepares models for inference.
        mode: a resolved compile mode.
        device: where the models are.
        dtype: what they compute in, under autocast.
    """

    def __init__(self, task: Task, mode: str, device: torch.device, dtype: torch.dtype) -> None:
        self.task = task
        self.mode = mode
        self.device = device
        self.dtype = dtype
        self.compiled: nn.Module | None = None
        self.tensors: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        """Return a model in evaluation mode with the weights that `model` has now; valid until the next call."""
        if self.mode == "off":
            return model.eval()
        prepared = self.task.prepare_for_inference(model, self.dtype)
        tensors = [*prepared.parameters(), *prepared.buffers()]
        if self.compiled is None:
            self.tensors = tensors
            self.compiled = compile_for_inference(prepared, self.mode, self.device, submodule=self.task.compiled_module)
        else:
            torch._foreach_copy_(self.tensors, tensors)
        return self.compiled

    def warm_up(self, model: nn.Module, config: Any, precision: Precision) -> None:
        """Capture the graph that the first evaluation will use, unless its images have other sizes than in training.

        The random number generators stay as they are.
        """
        if not uses_graphs(self.mode, self.device):
            return
        size = self.task.image_size(config, training=False)
        if size != self.task.image_size(config, training=True):
            return
        was_training = model.training
        with torch.random.fork_rng([self.device]), torch.no_grad(), precision.autocast():
            self.task.inference_call(config, self(model), config.DATA.BATCH_SIZE, size, self.device)()
        model.train(was_training)

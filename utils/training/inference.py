"""The model that evaluations run: prepared and compiled once, for the weights of several models in turn."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.speed.compile import compile_for_inference, uses_graphs
from utils.speed.inference_graphs import Function, InferenceGraphs
from utils.training.amp import Precision
from utils.training.task import Task


class SharedModel(Mapping[str, nn.Module]):
    """Models by name that share one module: getting one of them copies its weights there, unless they are there.

    Args:
        module: the module.
        tensors: its parameters and buffers.
        weights: their values for each name, in the same order.
    """

    def __init__(self, module: nn.Module, tensors: list[Tensor], weights: Mapping[str, list[Tensor]]) -> None:
        self.module = module
        self.tensors = tensors
        self.weights = weights
        self.current: str | None = None

    @torch.no_grad()
    def __getitem__(self, name: str) -> nn.Module:
        if name != self.current:
            torch._foreach_copy_(self.tensors, self.weights[name])
            self.current = name
        return self.module

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class InferenceModel:
    """Gives models as TEST.COMPILE has them: prepared and compiled, or unchanged for "off".

    The models must have one architecture. Only the first is compiled and captured; later ones hand it their weights.
    As a context it keeps graphs by shape until its end.

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
        self.graphs: list[InferenceGraphs] = []

    def make_graphs(self, function: Function) -> Function:
        """Return a function that replays CUDA graphs for frequent shapes."""
        self.graphs.append(InferenceGraphs(function))
        return self.graphs[-1]

    def __enter__(self) -> "InferenceModel":
        return self

    def __exit__(self, *_: object) -> None:
        """Give back the memory of graphs by shape, so that training has all of it after an evaluation."""
        for graphs in self.graphs:
            graphs.clear()

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return a model in evaluation mode with the weights that `model` has now; valid until the next call."""
        return self.together({"": model})[""]

    @torch.no_grad()
    def together(self, models: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Return models in evaluation mode with the weights that `models` have now, by name; valid until the next call.

        Getting one from the result makes its weights the current ones, so that others got before must not be used.
        """
        if self.mode == "off":
            return {name: model.eval() for name, model in models.items()}
        prepared = {name: self.task.prepare_for_inference(model, self.dtype) for name, model in models.items()}
        if self.compiled is None:
            first = copy.deepcopy(next(iter(prepared.values())))
            self.tensors = tensors_of(first)
            self.compiled = compile_for_inference(first, self.mode, submodule=self.task.compiled_module)
            if uses_graphs(self.mode, self.device):
                self.compiled = self.task.record_inference(self.compiled, self.make_graphs)
        weights = {name: tensors_of(model) for name, model in prepared.items()}
        return SharedModel(self.compiled, self.tensors, weights)

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


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]

"""torch.compile and CUDA graphs: what a compile mode means, and how a model is prepared for it."""

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from utils.logs.logger import logger
from utils.speed.streams import on_side_stream, side_stream

MODES = ("auto", "off", "default", "reduce-overhead", "max-autotune")
INDUCTOR_MODES = {"default": None, "reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
GRAPH_MODES = ("reduce-overhead", "max-autotune")
RECORDING = "recording"  # the stream of recordings, and of what is done before: nothing recorded may wait for another
MOST_VARIANTS = 64  # graphs of one region: grid sizes, with and without gradient, each once


def resolve_mode(mode: str, device: torch.device) -> str:
    """What "auto" is on this device: reduce-overhead on a GPU for which something can be compiled, else off."""
    if mode != "auto":
        return mode
    return "off" if compile_unsupported_reason(device) else "reduce-overhead"


@cache
def compile_unsupported_reason(device: torch.device) -> str:
    """Why nothing can be compiled for a device, or an empty string. If it is a GPU, the log says so, once."""
    if device.type != "cuda":
        return "there is no GPU"
    reason = ""
    if find_spec("triton") is None:
        reason = "Triton is not installed"
    elif not ("CC" in os.environ or shutil.which("gcc") or shutil.which("clang")):
        reason = "Triton needs a C compiler: install gcc or clang, or let CC name one"
    if reason:
        logger.info("nothing is compiled: %s", reason)
    return reason


def compile_regions(model: nn.Module, mode: str, activation_budget: float = 1.0) -> nn.Module:
    """Compile, in place, those modules inside the model that say `is_region`, or else the model itself.

    Blocks of one stage share one graph, so a deep model compiles as fast as a shallow one. Names in the state_dict
    stay as they are. Nothing happens for "off". Below an `activation_budget` of 1 a training step keeps about that
    share of its activations in memory, and the backward pass computes the others again, the cheap ones first.
    """
    if mode == "off":
        return model
    # Torch 2.6 has the former name.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), MOST_VARIANTS))
    torch._functorch.config.activation_memory_budget = activation_budget
    regions = [module for module in model.modules() if getattr(module, "is_region", False)]
    for module in regions or [model]:
        module.compile(mode=INDUCTOR_MODES[mode])
    return model


def uses_graphs(mode: str, device: torch.device) -> bool:
    """Whether a mode replays CUDA graphs on this device."""
    return mode in GRAPH_MODES and device.type == "cuda"


def effective_mode(mode: str, *, is_captured: bool) -> str:
    """What a mode came to: itself, or without a graph what is left of it."""
    return mode if is_captured or mode not in GRAPH_MODES else INDUCTOR_MODES[mode] or "default"


class Capture:
    """A function on the device as one CUDA graph, replayed at each call: no work for the host but one launch.

    Args:
        function: reads its tensors from where they are, every time; must not wait for the device, nor choose its way by
            anything that changes. It is called `warmup_calls` times before it is recorded.
    """

    def __init__(self, function: Callable[[], Any], warmup_calls: int = 3) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        with on_side_stream(device, RECORDING):
            for _ in range(warmup_calls):
                function()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        # A loader's thread may allocate pinned memory meanwhile, which "global", the default, forbids to all threads.
        with torch.cuda.graph(self.graph, stream=side_stream(device, RECORDING), capture_error_mode="thread_local"):
            self.result = function()

    def __call__(self) -> Any:
        """Replay; the result lies in the same tensors each time."""
        self.graph.replay()
        return self.result


class CapturedModel(nn.Module):
    """A model in evaluation whose forward pass is one CUDA graph for each of the first few input shapes.

    Other shapes run without a graph. Call it without gradient, under one and the same autocast.
    """

    def __init__(self, model: nn.Module, most_shapes: int = 8) -> None:
        super().__init__()
        self.model = model
        self.most_shapes = most_shapes
        self.captures: dict[tuple[int, ...], tuple[Tensor, Capture]] = {}
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in self.captures:
            if len(self.captures) == self.most_shapes:
                return self.model(images)
            static = images.clone(memory_format=torch.preserve_format)
            self.captures[shape] = static, Capture(lambda: self.model(static))
        static, capture = self.captures[shape]
        static.copy_(images)
        return capture().clone()


def prepared_for_inference(model: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """The model through a mode's compilation and graphs, for evaluation."""
    model = compile_regions(model.eval(), mode)
    return CapturedModel(model) if uses_graphs(mode, device) else model

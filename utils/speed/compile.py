"""torch.compile and CUDA graphs: compile modes, and preparing a model for them."""

import hashlib
import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from utils.logs.logger import logger
from utils.speed.compile_fallback import with_fallback
from utils.speed.compile_workers import start_compile_workers
from utils.speed.streams import on_side_stream, side_stream

# CUDA graphs of code that is not compiled: what "auto" stands for in evaluation, short runs and detection's training
GRAPHS = "graphs"
INDUCTOR_MODES = {"default": None, "reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
GRAPH_MODES = ("reduce-overhead", "max-autotune", GRAPHS)
# The default, "global", forbids all threads to allocate, and a data loader's thread may allocate pinned memory.
CAPTURE_ERROR_MODE = "thread_local"
RECORDING = "recording"  # stream of captures and of their warm-up: a captured graph must not wait for another stream
# Compiling gains about 15% of the time, and takes half a minute, in which an H200 computes 4e15 FLOPs.
MIN_TRAINING_FLOPS = 3e16  # an epoch of ImageNet-1K with MLLA-T at 224x224
MIN_RECORDED_STEPS = 100  # as many as allow one recording, see shape_graphs.py
MAX_VARIANTS = 64  # compiled graphs per region: one per grid size, with and without gradient


def resolve_training_mode(
    mode: str, device: torch.device, *, num_steps: int, flops: float = inf, auto: str = "reduce-overhead"
) -> str:
    """Resolve TRAIN.COMPILE: on a GPU "auto" stands for `auto`, unless the run is too short for it to pay off.

    Where a whole step can be one CUDA graph, a GPU without compilation gets that: the capture takes a second.

    Args:
        mode: TRAIN.COMPILE.
        device: where the model is trained.
        num_steps: optimizer steps of the run.
        flops: of the run on this device, see flops.py.
        auto: the mode that "auto" stands for.
    """
    if mode != "auto":
        return mode
    if device.type != "cuda" or (auto == GRAPHS and num_steps < MIN_RECORDED_STEPS):
        return "off"
    if auto == GRAPHS:
        return GRAPHS
    uncompiled = GRAPHS if auto in GRAPH_MODES else "off"
    if compile_unsupported_reason(device):
        return uncompiled
    if flops < MIN_TRAINING_FLOPS:
        logger.info(
            "TRAIN.COMPILE auto: %s, since the run is short: %.2g PFLOP; compiling pays off from %.0f on",
            *(uncompiled, flops / 1e15, MIN_TRAINING_FLOPS / 1e15),
        )
        return uncompiled
    return auto


def resolve_inference_mode(mode: str, device: torch.device, *, for_speed: bool = False) -> str:
    """Resolve TEST.COMPILE: "auto" captures CUDA graphs on a GPU, which takes a second.

    Compiling as well makes MLLA-T 8% faster, which pays for its 10 to 30 s after a million images.

    Args:
        mode: TEST.COMPILE.
        device: where the model is evaluated.
        for_speed: "auto" compiles as well, since speed itself is measured.
    """
    if mode != "auto":
        return mode
    if device.type != "cuda":
        return "off"
    return GRAPHS if not for_speed or compile_unsupported_reason(device) else "reduce-overhead"


@cache
def compile_unsupported_reason(device: torch.device) -> str:
    """Return why code cannot be compiled for a device, or an empty string. For a GPU it is logged, once."""
    if device.type != "cuda":
        return "there is no GPU"
    reason = ""
    if find_spec("triton") is None:
        reason = "Triton is not installed"
    elif not ("CC" in os.environ or shutil.which("gcc") or shutil.which("clang")):
        reason = "Triton needs a C compiler: install gcc or clang, or let CC name one"
    if reason:
        logger.info("torch.compile is off: %s", reason)
    return reason


def compile_regions(
    model: nn.Module, mode: str, activation_budget: float = 1.0, *, has_one_shape: bool = False
) -> nn.Module:
    """Compile in place the modules of the model that have `is_region`, or the model itself if none has.

    The blocks of a stage share one graph, so a deep model compiles as fast as a shallow one. Names in the state_dict do
    not change. What cannot be compiled falls back to eager PyTorch, see `with_fallback`.

    Args:
        model: compiled in place.
        mode: a resolved compile mode; "off" and "graphs" do nothing.
        activation_budget: share of the activations that a training step keeps in memory; the backward pass recomputes
            the others, the cheap ones first.
        has_one_shape: all inputs have one shape, so that each graph is compiled for its sizes alone: on a GPU, graphs
            after the first one otherwise get symbolic sizes, which take longer to trace.
    """
    if mode in ("off", GRAPHS):
        return model
    # torch 2.6 has the old name.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), MAX_VARIANTS))
    if not hasattr(torch._dynamo.config, "allow_unspec_int_on_nn_module"):
        # torch 2.6 turns integers of modules that differ between blocks into symbols, which have no self-test.
        torch._dynamo.config.specialize_int = True
    torch._functorch.config.activation_memory_budget = activation_budget
    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
        # The backward pass is compiled in the forward call, where it can fall back; torch 2.6 has no such switch.
        torch._functorch.config.force_non_lazy_backward_lowering = True
    merge_small_kernels()
    regions = [module for module in model.modules() if getattr(module, "is_region", False)]
    remember_autograd_functions(regions)
    start_compile_workers()
    # Inductor's code for CPUs fails on views of symbolic sizes, "cannot determine truth value of Relational".
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    is_dynamic = False if has_one_shape or is_on_cpu else None
    failed: set[type[nn.Module]] = set()
    for module in regions or [model]:
        module.compile(mode=INDUCTOR_MODES[mode], dynamic=is_dynamic)
        module._compiled_call_impl = with_fallback(module, failed)
    return model


def merge_small_kernels() -> None:
    """Let inductor join independent kernels, such as the casts of a block's weights: 2% of MLLA-T's training step."""
    from torch._inductor import config as inductor  # takes a second

    if hasattr(inductor, "combo_kernels_pointwise_only"):  # older versions are not mature
        inductor.combo_kernels = True
        inductor.combo_kernels_pointwise_only = True
        inductor.combo_kernels_autotune = 0  # which would compile them several times


def remember_autograd_functions(regions: Sequence[nn.Module]) -> None:
    """Let torch.compile's cache on disk hold code with autograd functions, as long as the regions' source is the same.

    torch leaves such code out by default, since its key has no hash of the functions' source. The compile workers,
    which read the key for timed kernels that is in their environment, must be started later. The functions that a
    region lists in `autograd_calls` are not traced by dynamo either, which takes as long as everything else it does.
    """
    from torch._inductor import config as inductor

    name, marked = "autograd_cache_allow_custom_autograd_functions", "unsafe_marked_cacheable_functions"  # since 2.8
    places = (torch._functorch.config, name), (torch.compiler.config, "cache_key_tag"), (inductor, marked)
    if not all(hasattr(config, key) for config, key in places):
        return
    folders = {Path(inspect.getfile(type(region))).parent for region in regions}
    files = sorted(file for folder in folders for glob in ("*.py", "*/*.py") for file in folder.glob(glob))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    torch.compiler.config.cache_key_tag = digest
    os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] = digest  # where it differs, each start times the kernels again
    setattr(torch._functorch.config, name, True)
    listed: list[Any] = [region for region in regions if hasattr(region, "autograd_calls")]
    calls = {f"{call.__module__}.{call.__name__}": call for region in listed for call in region.autograd_calls()}
    for call_name, call in calls.items():
        torch._dynamo.allow_in_graph(call)
        getattr(inductor, marked)[call_name] = digest


def uses_graphs(mode: str, device: torch.device) -> bool:
    """Return whether a mode uses CUDA graphs on this device."""
    return mode in GRAPH_MODES and device.type == "cuda"


def effective_mode(mode: str, *, is_captured: bool) -> str:
    """Return the mode that takes effect: without a captured graph, one that only compiles."""
    if is_captured or mode not in GRAPH_MODES:
        return mode
    return "off" if mode == GRAPHS else INDUCTOR_MODES[mode] or "default"


class Capture:
    """Function captured as a CUDA graph, and replayed at each call: one launch for the host.

    Args:
        function: reads its inputs from the same tensors each time; must neither wait for the device nor branch on
            values that change.
        warmup_calls: calls before the capture.
        pool: memory pool that it shares with other captures, which are replayed in the order of their capture, or do
            not need each other's results; None: its own.

    Raises:
        RuntimeError: the function cannot be captured, for the reason that its own error tells. What it has changed
            stays changed, but streams, memory and random numbers are as usable as before.
    """

    def __init__(self, function: Callable[[], Any], warmup_calls: int = 3, pool: Any = None) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        with on_side_stream(device, RECORDING):
            for _ in range(warmup_calls):
                function()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        stream, pool = side_stream(device, RECORDING), pool or torch.cuda.graph_pool_handle()
        cause: BaseException | None = None
        try:
            # The outer context restores the current stream after a failure too, which the inner one does not.
            with torch.cuda.stream(stream), torch.cuda.graph(self.graph, pool, stream, CAPTURE_ERROR_MODE):
                try:
                    self.result = function()
                except BaseException as error:
                    cause = error
                    raise
        except BaseException as error:
            clean_up_failed_capture(device, pool)
            raise cause or error from None  # ending the capture fails as well, but does not say why
        finally:
            cause = None  # its traceback would keep this frame alive, and so the memory of the capture

    def __call__(self) -> Any:
        """Replay the graph; the result is in the same tensors each time."""
        self.graph.replay()
        return self.result


def clean_up_failed_capture(device: torch.device, pool: Any) -> None:
    """Restore what torch leaves as it is during a capture if that fails: memory allocator and random generator.

    Else tensors that several streams have used would never be freed, and the next random number would be an error.
    """
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # torch 2.6 has the second
    end_allocate = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
    with suppress(RuntimeError):  # of a capture that had been ended
        end_allocate(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    # A capture that succeeds ends the generator's part in the failed one.
    stream = side_stream(device, RECORDING)
    again = torch.cuda.graph(torch.cuda.CUDAGraph(), None, stream, CAPTURE_ERROR_MODE)
    with suppress(RuntimeError), torch.cuda.stream(stream), again:
        torch.zeros(1, device=device)


class CapturedModel(nn.Module):
    """Model in evaluation mode with a CUDA graph for each of the first input shapes; other shapes run without a graph.

    A batch of at least half the size of a captured one is computed in that one's graph. Call the model always under
    the same autocast; gradients are off. Results are tensors, or lists, tuples or dictionaries of them, whose first
    dimension is the batch.
    """

    def __init__(self, model: nn.Module, max_shapes: int = 8) -> None:
        super().__init__()
        self.model = model
        self.max_shapes = max_shapes
        self.captures: dict[tuple[int, ...], tuple[Tensor, Capture]] = {}
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        shape = self.captured_shape(images)
        if shape is None:
            return self.model(images)
        static, capture = self.captures[shape]
        static[: len(images)].copy_(images)
        return tree_map(lambda tensor: tensor[: len(images)].clone(), capture())

    def captured_shape(self, images: Tensor) -> tuple[int, ...] | None:
        """Return the shape whose graph computes these images, captured now if there is room for one more."""
        shape = tuple(images.shape)
        count, *size = shape
        fitting = [other for other in self.captures if [*other[1:]] == size and count <= other[0] <= 2 * count]
        if fitting:
            return min(fitting)
        if len(self.captures) == self.max_shapes:
            return None
        static = images.clone(memory_format=torch.preserve_format)
        try:
            self.captures[shape] = static, Capture(lambda: self.model(static))
        except RuntimeError as error:  # also out of memory: a graph keeps what it allocates
            logger.warning("Evaluation runs without CUDA graphs, which failed: %s", " ".join(str(error).split())[:200])
            self.captures.clear()
            self.max_shapes = 0
            return None
        return shape


def compile_for_inference(model: nn.Module, mode: str, *, submodule: str = "") -> nn.Module:
    """Compile a model for evaluation in place.

    Args:
        model: the model.
        mode: a resolved compile mode.
        submodule: name of the part that is compiled; "": the whole model.
    """
    model = model.eval()
    compiled = compile_regions(model.get_submodule(submodule), mode)
    return model if submodule else compiled

"""Whether a training step fits into memory, estimated before the first one."""

import copy
import os

import torch
from torch import nn

from utils.speed.memory import activation_bytes, available_bytes, memory_remedies
from utils.training.derived import Derived
from utils.training.task import Run, Task

# Shares of what eager PyTorch keeps in float32, for MLLA-T at batch 128: under autocast, which keeps float32 for norms
# and sums; and at least, on a GPU with compiled blocks and kernels (models/kernels/README.md: 6,914 of 14,411 MiB).
AMP_SHARE, GPU_SHARE = 0.69, 0.35
GIB = 2**30


def memory_warning(task: Task, run: Run, derived: Derived) -> str:
    """Return a warning if a training step will hardly fit into the memory that is left; "" if it will, or may."""
    config, process = run.config, run.process
    needed, available = step_bytes(task, run, derived), available_bytes(process.device)
    if needed is None or available is None:
        return ""
    if process.device.type == "cuda":
        needed = int(GPU_SHARE * needed)
    else:
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", process.num_processes))
    if needed <= available:
        return ""
    work, batch_size = task.memory_request(config)
    remedies = memory_remedies(
        batch_size=batch_size,
        accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
        amp=config.AMP,
        can_checkpoint=not config.TRAIN.USE_CHECKPOINT and not config.MODEL.TYPE.startswith("timm:"),
        smaller=task.smaller_images,
    )
    return (
        f"a step with {work} needs about {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are free: "
        f"{remedies}. Without enough memory the system may end the run without a word"
    )


def step_bytes(task: Task, run: Run, derived: Derived) -> int | None:
    """Return about what a step adds to the memory: activations, gradients, the optimizer's state; None if not known."""
    config, copied = run.config, meta_copy(run.model).train()
    stages = [module for module in copied.modules() if getattr(module, "use_checkpoint", False)]
    if config.TRAIN.USE_CHECKPOINT and not stages:
        return None  # of timm
    for stage in stages:
        stage.use_checkpoint = False  # type: ignore[assignment]
    blocks = [block for stage in stages for block in stage.blocks]  # type: ignore[union-attr]
    try:
        kept = activation_bytes(lambda: task.training_forward(config, copied, derived), blocks)
    except (NotImplementedError, RuntimeError):  # an operation that cannot run without data
        return None
    if config.AMP:
        kept = int(AMP_SHARE * kept)
    trained = sum(parameter.nbytes for parameter in run.model.parameters() if parameter.requires_grad)
    return kept + trained * (3 if config.TRAIN.OPTIMIZER.NAME == "adamw" else 2)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the device "meta", which has shapes and no values."""
    memo: dict[int, object] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    with torch.random.fork_rng(devices=[]):
        return copy.deepcopy(model, memo)

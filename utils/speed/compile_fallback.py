"""Fallback of compiled modules to eager PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.logs.logger import logger
from utils.speed.compile_workers import compile_in_this_process, have_workers_died

# Parts of the messages of inductor and Triton.
MISSING_CPP_COMPILER = "InvalidCxxCompiler: "
MISSING_C_COMPILER = "Failed to find C compiler"  # for a GPU


def with_fallback(region: nn.Module, failed: set[type[nn.Module]]) -> Callable[..., Any]:
    """Return a compiled region's call that falls back to eager PyTorch if the region cannot be compiled.

    Where a compile worker has died, for example for lack of memory, the region is first compiled in this process.

    Args:
        region: the region, after `compile`.
        failed: classes of regions that have failed, which the regions of a model share.

    Raises:
        RuntimeError: there is no compiler.
    """
    compiled: Callable[..., Any] = region._compiled_call_impl  # type: ignore[assignment]

    def call(*args: Any, **kwargs: Any) -> Any:
        if type(region) in failed:
            return region._call_impl(*args, **kwargs)
        if prepare := getattr(type(region), "before_compiled_call", None):
            prepare(region)
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = f"{type(error).__name__}: {error}"
            if MISSING_CPP_COMPILER in reason or MISSING_C_COMPILER in reason:
                raise
            is_retried = have_workers_died(error)
        if is_retried:
            logger.warning("a process of torch.compile has died, from lack of memory perhaps; compiling without it")
            compile_in_this_process()
            return call(*args, **kwargs)
        failed.add(type(region))
        line = " ".join(reason.split())[:200]
        logger.warning("%s falls back to eager PyTorch, torch.compile failed: %s", type(region).__name__, line)
        return region._call_impl(*args, **kwargs)

    return call

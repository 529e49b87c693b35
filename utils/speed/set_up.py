"""A shorter set-up: libraries are loaded beside it, and the garbage collector does not interrupt it."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F


@contextmanager
def loading_cuda_libraries(device: torch.device) -> Iterator[None]:
    """Let a thread load cuDNN and cuBLAS while the context lasts, which takes most of a second; nothing on a CPU.

    At its end the thread has ended: processes may be forked then.
    """
    thread = threading.Thread(target=use_libraries, args=(device,), name="CUDA libraries", daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield
    finally:
        if thread.ident is not None:
            thread.join()


def use_libraries(device: torch.device) -> None:
    """Run a small convolution and a matrix product, forward and backward; no random numbers, and no errors."""
    with suppress(Exception):  # what fails here fails again, with its reason, where it is needed
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins on the first GPU, which may be another process's
        images = torch.zeros(8, 32, 32, 32, dtype=torch.bfloat16, device=device, requires_grad=True)  # (B, C, H, W)
        kernels = torch.zeros(32, 32, 3, 3, dtype=torch.bfloat16, device=device, requires_grad=True)
        weight = torch.zeros(32, 32, dtype=torch.bfloat16, device=device, requires_grad=True)
        maps = F.conv2d(images.contiguous(memory_format=torch.channels_last), kernels, padding=1)
        tokens = F.linear(maps.permute(0, 2, 3, 1), weight)  # (B, H, W, C)
        torch.autograd.grad(tokens.sum(), (images, kernels, weight))
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Keep Python's garbage collector off while the context lasts.

    Compiling makes millions of objects that stay; looking at them again and again takes a tenth of its time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

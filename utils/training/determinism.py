"""Runs that give the same bits each time on GPUs of one kind."""

import os

import torch

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else cuBLAS may choose another algorithm with another workspace
    "NCCL_ALGO": "Ring",  # else the order of additions may depend on what NCCL measured
}


def use_deterministic_algorithms() -> None:
    """Let PyTorch, cuBLAS, cuDNN, inductor and NCCL use deterministic algorithms; called before CUDA starts.

    An operation that has none is not refused: PyTorch warns, and names it.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A pass over new memory, which nothing here reads before writing it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    from torch._inductor import config as inductor  # takes a second

    if hasattr(inductor, "deterministic"):  # since torch 2.10: no choice by timing
        inductor.deterministic = True  # type: ignore[attr-defined]

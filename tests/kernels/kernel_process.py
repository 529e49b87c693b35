"""Where kernels are checked: on a GPU, or by Triton's interpreter where there is none. Imported before Triton is."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))


def run_checks(*checks: Callable[[], None]) -> None:
    """Those checks whose names hold a word of the command line, or all; a line for each."""
    from models.kernels import dispatch

    if DEVICE == "cpu":
        dispatch.missing_triton = lambda device_type: ""  # noqa: ARG005
    torch.backends.cudnn.allow_tf32 = False
    for check in checks:
        if sys.argv[1:] and not any(word in check.__name__ for word in sys.argv[1:]):
            continue
        start = time.perf_counter()
        check()
        print(f"{check.__name__} on {DEVICE}: {time.perf_counter() - start:.1f} s", flush=True)

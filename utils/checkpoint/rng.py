"""States of a process's random number generators: torch's, CUDA's, NumPy's and Python's."""

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

CUDA_STATE_BYTES = 16  # seed and offset
MT19937_WORDS = 624


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's random number generators, in types that load safely."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore this process's random number generators from `rng_state`'s result."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(python_state(state["python"]))
    np.random.set_state(numpy_state(state["numpy"]))


def python_state(stored: list[Any]) -> tuple[Any, ...]:
    version, words, gauss = stored
    return version, tuple(words), gauss


def numpy_state(stored: list[Any]) -> tuple[Any, ...]:
    name, keys, *rest = stored
    return name, keys.numpy().astype(np.uint32), *rest


def check_rng_state(state: Any) -> None:
    """Check stored states by setting generators of no other use, and what these do not check themselves.

    Raises:
        Exception: of any kind, where the state is not `rng_state`'s.
    """
    torch.Generator().set_state(state["torch"])
    cuda = state["cuda"]
    if cuda is not None and (cuda.dtype, tuple(cuda.shape), cuda.is_cpu) != (torch.uint8, (CUDA_STATE_BYTES,), True):
        raise ValueError("the state of CUDA's generator")
    random.Random().setstate(python_state(state["python"]))
    check_optional_normal(state["python"][2])
    name, keys, position, has_gauss, cached = state["numpy"]
    # NumPy would read memory at any position.
    if not (name == "MT19937" and isinstance(keys, Tensor) and keys.dtype is torch.int64 and has_gauss in (0, 1)):
        raise ValueError("the state of NumPy's generator")
    if type(position) is not int or not 0 <= position <= MT19937_WORDS or ((keys < 0) | (keys >= 2**32)).any():
        raise ValueError("the state of NumPy's generator")
    check_optional_normal(cached)
    np.random.RandomState().set_state(numpy_state(state["numpy"]))


def check_optional_normal(value: Any) -> None:
    """Check a number that a generator keeps for its next call, if any."""
    if value is not None and not (isinstance(value, float) and math.isfinite(value)):
        raise ValueError("the next normal number of a generator")

"""The kernels of the fused update against torch's clipping, AdamW and EMA, and against their reference."""

import pytest
import torch

from tests.utils.training.test_fused_update import EMA_KINDS, assert_equal_runs, train
from utils.training.fused_update_support import passes_self_test
from utils.training.triton_update import BLOCK


@pytest.mark.parametrize("offset", [0, 1])
def test_self_test(device: torch.device, offset: int) -> None:
    assert passes_self_test(device, offset)


@pytest.mark.parametrize("ema", EMA_KINDS)
@pytest.mark.parametrize("alignment", [0, 1])
def test_kernels_equal_torch_and_their_reference(device: torch.device, ema: dict[str, bool], alignment: int) -> None:
    """Chunks of every kind: full, a multiple of four, odd, and shorter than a block."""
    sizes = ((2 * BLOCK + 1, 4), (BLOCK + 3,), (3, 5, 7, 9), (1,), (64,))
    results = [train(kind, device, sizes=sizes, offset=alignment, **ema) for kind in ("kernels", "torch", "reference")]
    assert_equal_runs(results[0], results[1])
    assert_equal_runs(results[0], results[2])

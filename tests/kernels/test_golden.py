"""The network with kernels beside the official model's logits and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import MLLA, prepare_for_inference, use_kernels
from tests.helpers import GOLDEN, MICRO, fill_weights, random_values

pytest.importorskip("triton")


def filled(device: torch.device, kernels: str = "triton", **changes: object) -> nn.Module:
    model = use_kernels(MLLA(**{**MICRO, "num_classes": 10, **changes}), kernels)  # type: ignore[arg-type]
    fill_weights(model)
    return model.to(device)


def test_golden_logits(device: torch.device) -> None:
    count = 1 if device.type == "cpu" else 2  # images; the interpreter is slow
    with torch.no_grad():
        logits = filled(device).eval()(random_values(0, 2, 3, 64, 64)[:count].to(device))
    np.testing.assert_allclose(logits.cpu(), np.load(GOLDEN / "mlla_micro_64.npz")["logits"][:count], atol=1e-4)


def test_golden_gradients(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("takes too long in Triton's interpreter")
    golden = np.load(GOLDEN / "mlla_micro_64_grad.npz")
    model = filled(device).train()
    images = random_values(1, 4, 3, 64, 64).to(device).requires_grad_()
    loss = F.cross_entropy(model(images), random_values(101, 4, 10).softmax(1).to(device))
    loss.backward()
    assert abs(loss.item() - golden["loss"].item()) < 1e-5
    assert images.grad is not None
    largest = np.abs(golden["grad_input"]).max()
    np.testing.assert_allclose(images.grad.cpu(), golden["grad_input"], atol=1e-3 * largest)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        np.testing.assert_allclose(
            parameter.grad.norm().item(), golden[f"gradnorm/{name}"].item(), rtol=1e-3, atol=1e-6, err_msg=name
        )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepared_model(device: torch.device, dtype: torch.dtype) -> None:
    """Joined products, sums inside of them, and cuBLAS's GELU on a GPU: in 16 bits no worse than eager PyTorch."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes no products of bfloat16")
    shape, changes = (1, 3, 32, 32), {}  # the interpreter is slow
    if device.type == "cuda":
        shape, changes = (2, 3, 64, 64), {"embed_dim": 64, "num_heads": (2, 4, 8, 16)}
    fused, eager = (filled(device, kernels, **changes).eval() for kernels in ("triton", "torch"))
    images = random_values(0, *shape).to(device)
    expected = eager.double()(images.double())
    eager.float()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        outputs = [prepare_for_inference(model, dtype)(images) for model in (fused, eager)]
        outputs.append(eager(images))
    *errors, eager_error = (((x.double() - expected).norm() / expected.norm()).item() for x in outputs)
    assert max(errors) < 1.3 * eager_error + 1e-6, (errors, eager_error)

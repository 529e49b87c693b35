"""Schemas, fake tensors and gradients' registration of the operators, as torch.compile relies on them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels.matmul import linear_again

ops = pytest.importorskip("models.kernels.ops", exc_type=ImportError)


@pytest.fixture
def draw(device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def check(operator: Any, *args: Any) -> Any:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, args, test_utils=tests)
    return operator(*args)


def test_convolutions_and_norm(draw: Any) -> None:
    x, taps, bias = draw(1, 4, 6, 32), draw(32, 1, 3, 3), draw(32)
    check(ops.conv_norm, x, taps, bias, bias, bias, 1e-5)
    found = check(ops.layer_norm, x, bias, bias, 1e-5)
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(x, (32,), bias, bias))
    check(ops.norm_backward, x, x, x, draw(1, 1, 1, 1), bias, bias, 1e-5)
    check(ops.conv_silu, x, taps, bias, True)
    check(ops.conv_silu, x, taps, bias, False)
    check(ops.conv_backward, x, x, taps, None, True, False)
    check(ops.conv_backward, x, x, taps, x, False, True)
    wide = check(ops.strided_conv, x, taps, bias)
    check(ops.wide_conv_backward, wide, x, taps, wide)


def test_attention(draw: Any) -> None:
    x, taps, bias, table = draw(2, 4, 6, 32), draw(32, 1, 3, 3), draw(32), draw(6, 8)
    qk = draw(2, 4, 6, 64)
    check(ops.linear_attention_inference, qk, x, x, taps, bias, table, table, 2)
    _, ungated, *state = check(ops.linear_attention, qk, x, x, taps, bias, table, table, 2)
    check(ops.linear_attention_backward, x, draw(2, 1, 1, 1), qk, x, x, ungated, table, table, *state, 2)


def test_mlp_and_elementwise(draw: Any) -> None:
    x = draw(1, 4, 6, 32)
    check(linear_again, x, draw(64, 32), draw(64))
    check(ops.gelu, x)
    check(ops.gelu_backward, x, draw(1, 1, 1, 1), x)
    check(ops.mlp, x, draw(128, 32), draw(128), draw(32, 128), draw(32), x)


def test_few_tokens(draw: Any) -> None:
    x, taps, bias, table, square = draw(1, 4, 6, 32), draw(32, 1, 3, 3), draw(32), draw(10, 8), draw(32, 32)
    conv_and_norm, double = (taps, bias, bias, bias), (draw(64, 32), draw(64))
    check(
        *(ops.few_tokens_mixer, x, table, table, 2, 1e-5, *conv_and_norm, *double, taps, bias, *double, taps, bias),
        *(square, bias),
    )
    check(ops.few_tokens_mlp, x, 1e-5, *conv_and_norm, draw(128, 32), draw(128), draw(32, 128), bias)


def test_sums(draw: Any) -> None:
    check(ops.sum_parts, [draw(3, 10, 32), draw(2, 1, 8)])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_stem(draw: Any, memory_format: torch.memory_format) -> None:
    images, weight = draw(1, 3, 4, 8), draw(8, 3, 3, 3).contiguous(memory_format=memory_format)
    gradient: Tensor = images.new_ones(1, 8, 2, 4)
    check(ops.stem_conv, images, weight.clone().requires_grad_(), torch.float16)
    check(ops.stem_conv_backward, gradient, images, weight)
    check(ops.stem_conv_relu, images, weight, draw(8), torch.float16)
    x = draw(2, 8, 6, 4)
    check(ops.stem_layer, x, draw(8, 8, 3, 3), draw(8))
    check(ops.stem_layer, x, draw(8, 8, 3, 3), draw(8), x)

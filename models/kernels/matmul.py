"""Matrix products; the operators among them take a neighboring operation along in cuBLAS, or hide from torch.compile
that they were computed before. Without Triton, and without gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in x's dtype; x (..., C), weight (K, C)."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("mlla::linear_again", mutates_args=())
def linear_again(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same for a backward pass; torch.compile would keep the forward pass's result instead."""
    return linear(x, weight, bias)


@torch.library.custom_op("mlla::add_product", mutates_args=("x",))
def add_product(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """x += y weight^T, in place; x (..., C) contiguous, y (..., K), weight (C, K), all of one dtype."""
    x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), weight.t())


@torch.library.custom_op("mlla::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x weight^T + bias) with the tanh form of GELU that cuBLAS has; x (..., K), weight (C, K), on CUDA."""
    product = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return product.view(*x.shape[:-1], weight.shape[0])


@linear_again.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@add_product.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor) -> None:
    pass


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])

"""Matrix products that include a neighboring operation in cuBLAS, or that torch.compile must not share.

They need no Triton. The operators have no gradients; the eager PyTorch reference of each is in its docstring.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST_FUSED_MLP = 128  # channels; beyond, the matrix products are too large to keep a hidden layer in registers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias in x's dtype; x (..., C), weight (K, C)."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@torch.library.custom_op("mlla::linear_again", mutates_args=())
def linear_again(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `linear(x, weight, bias)` in a backward pass, where torch.compile would keep the forward pass's result."""
    return linear(x, weight, bias)


@torch.library.custom_op("mlla::add_product", mutates_args=("x",))
def add_product(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Add y weight^T to x in place; x (..., C) contiguous, y (..., K), weight (C, K), all of one dtype."""
    x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), weight.t())


@torch.library.custom_op("mlla::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x weight^T + bias) with cuBLAS's tanh form of GELU; x (..., K), weight (C, K), on CUDA."""
    product = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return product.view(*x.shape[:-1], weight.shape[0])


def takes_linear_gelu(x: Tensor, weight: Tensor) -> bool:
    """Return whether `linear_gelu` computes x weight^T: in 16 bits, whose rounding hides its form of GELU."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == x.dtype


def add_linear(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return x + y weight^T, in the product and in place if x allows it; x (..., C), y (..., K), weight (C, K)."""
    if x.dtype != weight.dtype or not x.is_contiguous():
        return x + F.linear(y, weight)
    add_product(x, y.to(x.dtype), weight)
    return x


@linear_again.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@add_product.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor) -> None:
    pass


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])

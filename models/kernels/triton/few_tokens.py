"""The block of one image or a few: tiles and launches of the kernels in few_tokens_kernels.py."""

from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from models.kernels.triton.few_tokens_kernels import (
    attend_gate_kernel,
    conv_linear_kernel,
    conv_mlp_kernel,
    few_sums_kernel,
    linear_add_kernel,
)
from models.kernels.triton.launch import dependent_launch, matmul_precision, on_its_device, token_stride

T = TypeVar("T")


class Tile(NamedTuple):
    """Tokens and outputs of one program, its warps, and parts of the sum over inputs that its warps share."""

    tokens: int
    units: int
    warps: int
    split: int = 1


class AttentionTile(NamedTuple):
    """Parts of an image's tokens in the sums of k and v, tokens of q in one program, its warps, and tokens per step of
    a sum.

    With 0 parts, each program that attends sums k and v itself.
    """

    parts: int
    queries: int
    warps: int
    block: int


# By width: the fastest of some tiles for one image of 224x224 on an H200. Widths between take the next one.
PROJECTION = {64: Tile(32, 128, 8), 128: Tile(16, 128, 4), 256: Tile(16, 128, 8), 512: Tile(16, 64, 8)}
QUERY_KEY = {64: Tile(32, 128, 8), 128: Tile(16, 128, 4), 256: Tile(16, 64, 8), 512: Tile(16, 64, 8)}
ATTENTION = {
    64: AttentionTile(16, 64, 8, 256),
    128: AttentionTile(4, 32, 4, 256),
    256: AttentionTile(4, 32, 4, 64),
    512: AttentionTile(0, 16, 2, 64),
}
OUT = {64: Tile(16, 64, 4), 128: Tile(16, 64, 4), 256: Tile(16, 64, 4), 512: Tile(16, 32, 4)}
MLP = {64: Tile(32, 128, 8)}  # widths whose MLP is one launch
WIDEN = {128: Tile(16, 256, 4), 256: Tile(16, 256, 8), 512: Tile(16, 128, 8)}
NARROW = {128: Tile(16, 64, 4), 256: Tile(16, 32, 4), 512: Tile(16, 16, 8, 8)}
LONGEST_INPUT = 2048  # of a product, that a program loads at once


def tile_of(table: dict[int, T], channels: int) -> T:
    """Return the tile for a width, of the nearest one in a table."""
    return table[min(max(triton.next_power_of_2(channels), min(table)), max(table))]


def width_of(channels: int) -> int:
    """Return the power of two of channels that a program holds; tl.dot takes 16 and more."""
    return max(16, triton.next_power_of_2(channels))


@on_its_device
def conv_linear(
    x: Tensor, taps: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile,
    *, norm: tuple[Tensor, Tensor, float] | None = None, use_gelu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return x + conv(x), and the product of its norm, (weight, bias, eps), with weight^T; bias is added to that.

    Without `norm`, SiLU(conv(x)) and its product. x is (B, H, W, C) or a slice of wider tokens.
    """
    batch, height, width, channels = x.shape
    x, stride = token_stride(x)
    num_tokens, units = batch * height * width, weight.shape[0]
    conv_out = torch.empty(batch, height, width, channels, dtype=x.dtype, device=x.device)
    out = torch.empty(batch, height, width, units, dtype=x.dtype, device=x.device)
    norm_weight, norm_bias, eps = norm or (conv_bias, conv_bias, 0.0)
    conv_linear_kernel[(triton.cdiv(num_tokens, tile.tokens), triton.cdiv(units, tile.units))](
        *(x, taps, conv_bias, norm_weight, norm_bias, weight, conv_bias if bias is None else bias, conv_out, out),
        *(num_tokens, height, width, stride, units, eps),
        NORM=norm is not None, GELU=use_gelu, BIAS=bias is not None, PRECISION=matmul_precision(x.dtype),
        CHANNELS=channels, WIDTH=width_of(channels), TOKENS=tile.tokens, UNITS=tile.units,
        num_warps=tile.warps, num_stages=1, **dependent_launch(x.device),
    )  # fmt: skip
    return conv_out, out


@on_its_device
def conv_mlp(
    x: Tensor, taps: Tensor, conv_bias: Tensor, norm: tuple[Tensor, Tensor, float],
    weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, tile: Tile,
) -> Tensor:  # fmt: skip
    """Return y + MLP(LayerNorm(y)) with y = x + conv(x), (B, H, W, C), in one launch."""
    _, height, width, channels = x.shape
    x, stride = token_stride(x)
    num_tokens = x.numel() // channels
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    conv_mlp_kernel[(triton.cdiv(num_tokens, tile.tokens),)](
        *(x, taps, conv_bias, *norm[:2], weight1, bias1, weight2, bias2, out),
        *(num_tokens, height, width, stride, norm[2]),
        PRECISION=matmul_precision(x.dtype), CHANNELS=channels, HIDDEN=weight1.shape[0], WIDTH=width_of(channels),
        TOKENS=tile.tokens, UNITS=tile.units,
        num_warps=tile.warps, num_stages=1, **dependent_launch(x.device),
    )  # fmt: skip
    return out


@on_its_device
def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, tile: Tile) -> Tensor:
    """Return residual + x weight^T + bias; x (..., K), weight (C, K), residual (..., C), all contiguous."""
    units, length = weight.shape
    num_tokens = x.numel() // length
    out = torch.empty_like(residual)
    linear_add_kernel[(triton.cdiv(num_tokens, tile.tokens), triton.cdiv(units, tile.units))](
        *(x, weight, bias, residual, out, num_tokens, units),
        PRECISION=matmul_precision(x.dtype), LENGTH=length, BLOCK=min(LONGEST_INPUT, width_of(length)),
        TOKENS=tile.tokens, UNITS=tile.units, SPLIT=tile.split,
        num_warps=tile.warps, num_stages=1, **dependent_launch(x.device),
    )  # fmt: skip
    return out


@on_its_device
def attend_and_gate(
    qk: Tensor, v: Tensor, gate: Tensor, taps: Tensor, conv_bias: Tensor, cos: Tensor, sin: Tensor, heads: int,
    tile: AttentionTile,
) -> Tensor:  # fmt: skip
    """Return (attention + conv(v)) SiLU(gate), (B, H, W, C); qk and v contiguous, gate a slice of wider tokens."""
    batch, height, width, channels = v.shape
    num_tokens, dim, head_count = height * width, channels // heads, batch * heads
    gate, gate_stride = token_stride(gate)
    constants = {"DIM": dim, "PRECISION": matmul_precision(v.dtype), "MIXED": heads % 2 == 1, "num_stages": 1}
    constants |= dependent_launch(v.device)
    out = torch.empty_like(v)
    matrix = mean = qk
    if tile.parts:
        matrix = torch.empty(head_count, tile.parts, dim, dim, dtype=torch.float32, device=v.device)
        mean = torch.empty(head_count, tile.parts, dim, dtype=torch.float32, device=v.device)
        part = triton.cdiv(num_tokens, tile.parts)
        few_sums_kernel[(head_count, tile.parts)](
            *(qk, v, cos, sin, matrix, mean, num_tokens, width, heads, part),
            BLOCK=tile.block, num_warps=4 if tile.block <= 64 else 8, **constants,
        )  # fmt: skip
    attend_gate_kernel[(head_count, triton.cdiv(num_tokens, tile.queries))](
        *(qk, v, gate, taps, conv_bias, cos, sin, matrix, mean, out),
        *(num_tokens, height, width, heads, gate_stride),
        PARTS=tile.parts, BLOCK=tile.block, QUERIES=tile.queries,
        num_warps=tile.warps, **constants,
    )  # fmt: skip
    return out


def mixer_forward(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
    cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor, in_proj: Tensor, in_proj_bias: Tensor,
    dwc: Tensor, dwc_bias: Tensor, qk: Tensor, qk_bias: Tensor | None,
    lepe: Tensor, lepe_bias: Tensor, out: Tensor, out_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Add the attention branch to tokens x (B, H, W, C), in five launches, or four of the widest tokens."""
    channels = x.shape[-1]
    x, joined = conv_linear(
        *(x, cpe, cpe_bias, in_proj, in_proj_bias, tile_of(PROJECTION, channels)), norm=(norm, norm_bias, eps)
    )
    inner, gate = joined.chunk(2, dim=-1)  # (B, H, W, C) each
    v, queries_keys = conv_linear(inner, dwc, dwc_bias, qk, qk_bias, tile_of(QUERY_KEY, channels))
    tile = tile_of(ATTENTION, channels)
    gated = attend_and_gate(queries_keys, v, gate, lepe, lepe_bias, cos, sin, heads, tile)
    return linear_add(gated, out, out_bias, x, tile_of(OUT, channels))


def mlp_branch_forward(
    x: Tensor, eps: float, cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor,
    widen: Tensor, widen_bias: Tensor, narrow: Tensor, narrow_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Add the MLP branch to tokens x (B, H, W, C), in two launches, or one of narrow tokens."""
    channels = x.shape[-1]
    if channels <= max(MLP, default=0):
        tile = tile_of(MLP, channels)
        return conv_mlp(x, cpe, cpe_bias, (norm, norm_bias, eps), widen, widen_bias, narrow, narrow_bias, tile)
    x, hidden = conv_linear(
        *(x, cpe, cpe_bias, widen, widen_bias, tile_of(WIDEN, channels)), norm=(norm, norm_bias, eps), use_gelu=True
    )
    return linear_add(hidden, narrow, narrow_bias, x, tile_of(NARROW, channels))

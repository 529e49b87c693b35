"""Triton kernels for the stem's first convolution: 3x3, stride 2, padding 1, of RGB images (B, 3, H, W) of any strides.

Eager reference: `Stem.conv1` in models/layers.py.

H is even and W a multiple of 4. Two neighboring outputs of a row, a pair, see five columns, 15 values in each of three
rows. With channels last these are contiguous, and 16 from one before them on are aligned: a row of images becomes a
matrix (pairs, 16) by whole vectors. Its product with a (16, 2 C) matrix of weights, half of them zero, gives both
outputs of a pair, which lie side by side as tokens (B, H / 2, W / 2, C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import matmul_precision, num_multiprocessors, on_its_device
from models.kernels.triton.sums import sum_parts

WINDOW = tl.constexpr(16)  # values of a pair in one row of an image; the first is there for alignment alone
TAPS = tl.constexpr(27)
LARGEST_TILE, LARGEST_EXACT_TILE = 8192, 2048  # elements, what registers hold; in float32 products are unrolled
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 8, 2  # per multiprocessor
# Whether they are 1 or divisible by 16 makes no kernel faster, and each such case would be compiled by itself.
SIZES = ["num_pairs", "num_blocks", "height", "pairs_per_row", "image_stride", "row_stride"]
SIZES += [f"weight_{name}_stride" for name in ("output", "input", "row", "column")]


@triton.jit
def load_windows(
    images, pair, ok, k, height, pairs_per_row, image_stride, channel_stride, row_stride, column_stride,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Load the three rows' windows of pairs (pairs, 1), each (pairs, 16); zeros outside the image."""
    row, column = pair // pairs_per_row, pair % pairs_per_row
    image, row = row // height, row % height
    if PACKED:
        offset = k - 4
        image_stride = tl.multiple_of(image_stride, 4)
        row_stride = tl.multiple_of(row_stride, 4)
    else:
        offset = ((k + 2) // 3 - 2) * column_stride + (k + 2) % 3 * channel_stride
    pointer = images + image.to(tl.int64) * image_stride + (2 * row - 1) * row_stride
    pointer += 4 * column * column_stride + offset
    ok &= (column > 0) | (k >= 4)
    top = tl.load(pointer, mask=ok & (row > 0), other=0.0)
    middle = tl.load(pointer + row_stride, mask=ok, other=0.0)
    bottom = tl.load(pointer + 2 * row_stride, mask=ok, other=0.0)
    return top, middle, bottom


@triton.jit
def locate_weights(n, k, channels, output_stride, input_stride, column_stride):
    """Return the pair's output, the weight's offset and a mask for row k and column n of the weights' matrix."""
    output, column = n // channels, (k + 2) // 3 - 1
    column -= 2 * output
    offset = n % channels * output_stride + (k + 2) % 3 * input_stride + column * column_stride
    return output, offset, (column >= 0) & (column < 3) & (n < 2 * channels)


@triton.jit(do_not_specialize=SIZES)
def stem_forward_kernel(
    images, weight, bias, out, num_pairs, num_blocks, height, pairs_per_row, channels,
    image_stride, channel_stride, row_stride, column_stride,
    weight_output_stride, weight_input_stride, weight_row_stride, weight_column_stride,
    PACKED: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Store out = conv(images), with bias and ReLU if RELU; height is out's, COLUMNS at least 2 channels."""
    k, n = tl.arange(0, WINDOW), tl.arange(0, COLUMNS)[None, :]
    _, offset, weight_ok = locate_weights(
        n, k[:, None], channels, weight_output_stride, weight_input_stride, weight_column_stride
    )
    dtype = out.dtype.element_ty
    top_weight = tl.load(weight + offset, mask=weight_ok, other=0.0).to(dtype)
    middle_weight = tl.load(weight + offset + weight_row_stride, mask=weight_ok, other=0.0).to(dtype)
    bottom_weight = tl.load(weight + offset + 2 * weight_row_stride, mask=weight_ok, other=0.0).to(dtype)
    if RELU:
        start = tl.load(bias + n % channels).to(tl.float32)
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=STAGES):
        pair = (block * PAIRS + tl.arange(0, PAIRS))[:, None]
        ok = pair < num_pairs
        top, middle, bottom = load_windows(
            images, pair, ok, k[None, :], height, pairs_per_row, image_stride, channel_stride, row_stride,
            column_stride, PACKED,
        )  # fmt: skip
        result = tl.dot(top.to(dtype), top_weight, input_precision=PRECISION)
        result = tl.dot(middle.to(dtype), middle_weight, result, input_precision=PRECISION)
        result = tl.dot(bottom.to(dtype), bottom_weight, result, input_precision=PRECISION)
        if RELU:
            result = tl.maximum(result + start, 0.0)
        target = out + pair.to(tl.int64) * (2 * channels) + n
        tl.store(target, result.to(dtype), mask=ok & (n < 2 * channels))


@triton.jit(do_not_specialize=SIZES)
def stem_backward_kernel(
    grad, images, parts, num_pairs, num_blocks, height, pairs_per_row, channels,
    image_stride, channel_stride, row_stride, column_stride,
    weight_output_stride, weight_input_stride, weight_row_stride, weight_column_stride,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store the weight's gradient from this program's pairs in `parts` (2 programs, 27 channels)."""
    k, n = tl.arange(0, WINDOW)[None, :], tl.arange(0, COLUMNS)
    dtype = grad.dtype.element_ty
    top_sum = tl.zeros((COLUMNS, WINDOW), dtype=tl.float32)
    middle_sum = tl.zeros((COLUMNS, WINDOW), dtype=tl.float32)
    bottom_sum = tl.zeros((COLUMNS, WINDOW), dtype=tl.float32)
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=STAGES):
        pair = (block * PAIRS + tl.arange(0, PAIRS))[:, None]
        ok = pair < num_pairs
        top, middle, bottom = load_windows(
            images, pair, ok, k, height, pairs_per_row, image_stride, channel_stride, row_stride, column_stride, PACKED
        )
        source = grad + pair.to(tl.int64) * (2 * channels) + n[None, :]
        value = tl.trans(tl.load(source, mask=ok & (n < 2 * channels)[None, :], other=0.0))
        top_sum = tl.dot(value, top.to(dtype), top_sum, input_precision=PRECISION)
        middle_sum = tl.dot(value, middle.to(dtype), middle_sum, input_precision=PRECISION)
        bottom_sum = tl.dot(value, bottom.to(dtype), bottom_sum, input_precision=PRECISION)
    output, offset, ok = locate_weights(
        n[:, None], k, channels, weight_output_stride, weight_input_stride, weight_column_stride
    )
    target = parts + (2 * tl.program_id(0) + output) * (TAPS * channels) + offset
    tl.store(target, top_sum, mask=ok)
    tl.store(target + weight_row_stride, middle_sum, mask=ok)
    tl.store(target + 2 * weight_row_stride, bottom_sum, mask=ok)


def default_tile(channels: int, dtype: torch.dtype, stages: int) -> tuple[int, int, int]:
    """Return pairs of a block, warps and stages."""
    elements = LARGEST_EXACT_TILE if dtype == torch.float32 else LARGEST_TILE
    return max(16, min(128, elements // num_columns(channels))), 4, stages


def num_columns(channels: int) -> int:
    return max(16, triton.next_power_of_2(2 * channels))


def launch_args(images: Tensor, weight: Tensor, pairs: int) -> tuple[tuple[int, ...], dict[str, int | bool]]:
    """Return the sizes and strides that both kernels take, and their constants, for blocks of `pairs`."""
    batch, _, height, width = images.shape
    image, channel, row, column = images.stride()
    num_pairs = batch * (height // 2) * (width // 4)
    shape = (num_pairs, triton.cdiv(num_pairs, pairs), height // 2, width // 4, weight.shape[0])
    is_packed = channel == 1 and column == 3 and row % 4 == 0 and image % 4 == 0
    constants = {"COLUMNS": num_columns(weight.shape[0]), "PACKED": is_packed, "PAIRS": pairs}
    return (*shape, image, channel, row, column, *weight.stride()), constants


@on_its_device
def stem_forward(
    images: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *,
    tile: tuple[int, int, int] | None = None, programs_per_multiprocessor: int = FORWARD_PROGRAMS,
) -> Tensor:  # fmt: skip
    """Return conv(images), or with a bias ReLU(conv(images) + bias): (B, C, H / 2, W / 2), channels last.

    The result is of `dtype`, and so are the factors of its products. `tile`: pairs, warps, stages.
    """
    pairs, warps, stages = tile or default_tile(weight.shape[0], dtype, 2)
    batch, _, height, width = images.shape
    while pairs > 16 and batch * (height // 2) * (width // 4) < 2 * pairs * num_multiprocessors(images.device):
        pairs //= 2  # with one or two images, smaller blocks beat idle multiprocessors
    sizes, constants = launch_args(images, weight, pairs)
    out = torch.empty(batch, height // 2, width // 2, weight.shape[0], dtype=dtype, device=images.device)
    programs = min(sizes[1], programs_per_multiprocessor * num_multiprocessors(images.device))
    stem_forward_kernel[(programs,)](
        *(images, weight, bias, out, *sizes),
        RELU=bias is not None, PRECISION=matmul_precision(dtype), STAGES=stages, num_warps=warps, **constants,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)  # (B, C, H / 2, W / 2)


@on_its_device
def stem_backward(
    grad: Tensor, images: Tensor, weight: Tensor, *,
    tile: tuple[int, int, int] | None = None, programs_per_multiprocessor: int = BACKWARD_PROGRAMS,
) -> Tensor:  # fmt: skip
    """Return the weight's gradient, float32 in its memory format, for that of conv(images); `tile` as above."""
    pairs, warps, stages = tile or default_tile(weight.shape[0], grad.dtype, 1)
    grad = grad.permute(0, 2, 3, 1).contiguous()  # (B, H / 2, W / 2, C)
    like = torch.empty_like(weight, device="meta")  # dense, whatever views the weight is
    sizes, constants = launch_args(images, like, pairs)
    programs = min(sizes[1], programs_per_multiprocessor * num_multiprocessors(images.device))
    parts = torch.empty(2 * programs, 1, weight.shape[0] * TAPS.value, dtype=torch.float32, device=images.device)
    stem_backward_kernel[(programs,)](
        *(grad, images, parts, *sizes),
        PRECISION=matmul_precision(grad.dtype), STAGES=stages, num_warps=warps, **constants,
    )  # fmt: skip
    return sum_parts(parts).as_strided(weight.shape, like.stride())

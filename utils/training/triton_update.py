"""Triton kernels of FusedUpdate, which find their tensors by address.

`addresses` (parameters, 6), int64, has a row per parameter: the addresses of the float32 tensors below, 0 for none.
`chunks` (chunks, 4), int32: parameter, number of the chunk in it, number of elements, parameter group.

Where all addresses are multiples of 16 bytes, a thread loads four elements at once; up to three that are left in a
chunk follow one by one.
"""

import triton
import triton.language as tl
from torch import Tensor

PARAMETER, GRADIENT, EXP_AVG, EXP_AVG_SQ, EMA, STEP = (tl.constexpr(column) for column in range(6))
COLUMNS = tl.constexpr(6)
BLOCK = 1024  # elements at a time, by four
NUM_WARPS = 4
SINGLES = tl.constexpr(128)  # elements at a time, one by one: a thread's
PARAMETERS = 128  # per program of `advance`


@triton.jit
def at(start, index, BY_FOUR: tl.constexpr):
    """Return pointers to elements; with BY_FOUR, to aligned groups of four."""
    pointers = start + index
    if BY_FOUR:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def sum_squares_kernel(chunks, addresses, sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Store the sum of squares of each chunk of the gradients, in a fixed order; 0 without gradient."""
    chunk = tl.program_id(0)
    parameter = tl.load(chunks + chunk * 4)
    first = tl.load(chunks + chunk * 4 + 1).to(tl.int64) * CHUNK
    count = tl.load(chunks + chunk * 4 + 2)
    address = tl.load(addresses + parameter * COLUMNS + GRADIENT)
    gradient = address.to(tl.pointer_type(tl.float32)) + first
    count = tl.where(address != 0, count, 0)
    count_by_four = tl.where(address % 16 == 0, count // 4 * 4, 0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count_by_four, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(at(gradient, i, True), mask=i // 4 < count_by_four // 4, other=0.0)
        total += g * g
    singles = tl.zeros((SINGLES,), dtype=tl.float32)
    for start in range(count_by_four, count, SINGLES):
        i = start + tl.arange(0, SINGLES)
        g = tl.load(at(gradient, i, False), mask=i < count, other=0.0)
        singles += g * g
    tl.store(sums + chunk, tl.sum(total, axis=0) + tl.sum(singles, axis=0))


@triton.jit(do_not_specialize=["num_parameters"])
def advance_kernel(addresses, found_inf, log_betas, corrections, num_parameters, PARAMETERS: tl.constexpr):
    """Count the step of the parameters with gradient, and store their `corrections` (parameters, 2).

    These are 1 / (1 - beta1^step) and 1 / sqrt(1 - beta2^step), computed in float64.
    """
    parameter = tl.program_id(0) * PARAMETERS + tl.arange(0, PARAMETERS)
    row = addresses + parameter * COLUMNS
    is_used = tl.load(row + GRADIENT, mask=parameter < num_parameters, other=0) != 0
    step = tl.load(row + STEP, mask=is_used, other=0).to(tl.pointer_type(tl.float32))
    number = tl.load(step, mask=is_used, other=0.0) + (1.0 - tl.load(found_inf))
    tl.store(step, number, mask=is_used)
    exponent = tl.maximum(number, 1.0).to(tl.float64)  # 0 after skipped steps only
    share1 = 1 - tl.exp(exponent * tl.load(log_betas))
    share2 = 1 - tl.exp(exponent * tl.load(log_betas + 1))
    tl.store(corrections + parameter * 2, (1 / share1).to(tl.float32), mask=is_used)
    tl.store(corrections + parameter * 2 + 1, (1 / tl.sqrt(share2)).to(tl.float32), mask=is_used)


@triton.jit
def update_block(
    parameter, gradient, exp_avg, exp_avg_sq, ema, index, mask, is_updated, scale, decay, step_size, correction2,
    beta1, rest1, beta2, rest2, eps, ema_weight, HAS_EMA: tl.constexpr, BY_FOUR: tl.constexpr,
):  # fmt: skip
    """Update the elements `index` (BLOCK) from where the pointers point to."""
    p = tl.load(at(parameter, index, BY_FOUR), mask=mask)
    if HAS_EMA:
        average = tl.load(at(ema, index, BY_FOUR), mask=mask)
    if is_updated:
        g = tl.load(at(gradient, index, BY_FOUR), mask=mask) * scale
        m = beta1 * tl.load(at(exp_avg, index, BY_FOUR), mask=mask) + rest1 * g
        v = beta2 * tl.load(at(exp_avg_sq, index, BY_FOUR), mask=mask) + rest2 * (g * g)
        p -= decay * p
        p -= step_size * m / (tl.sqrt(v) * correction2 + eps)
        tl.store(at(exp_avg, index, BY_FOUR), m, mask=mask)
        tl.store(at(exp_avg_sq, index, BY_FOUR), v, mask=mask)
        tl.store(at(parameter, index, BY_FOUR), p, mask=mask)
    if HAS_EMA:
        near = average + ema_weight * (p - average)  # as torch.lerp
        far = p - (p - average) * (1 - ema_weight)
        tl.store(at(ema, index, BY_FOUR), tl.where(ema_weight < 0.5, near, far), mask=mask)


@triton.jit
def update_kernel(
    chunks, addresses, corrections, settings, grad_norm, found_inf, max_norm, beta1, rest1, beta2, rest2, eps,
    ema_weight, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_EMA: tl.constexpr,
):  # fmt: skip
    """Clip a chunk's gradient, update its moments and weights, and its EMA."""
    chunk = tl.program_id(0)
    average_weight = tl.load(ema_weight)
    row = tl.load(chunks + chunk * 4)
    first = tl.load(chunks + chunk * 4 + 1).to(tl.int64) * CHUNK
    count = tl.load(chunks + chunk * 4 + 2)
    group = tl.load(chunks + chunk * 4 + 3)
    scale = tl.minimum(max_norm / (tl.load(grad_norm) + 1e-6), 1.0)
    learning_rate = tl.load(settings + group * 2)
    decay = learning_rate * tl.load(settings + group * 2 + 1)
    step_size = learning_rate * tl.load(corrections + row * 2)
    correction2 = tl.load(corrections + row * 2 + 1)
    p = tl.load(addresses + row * COLUMNS + PARAMETER)
    g = tl.load(addresses + row * COLUMNS + GRADIENT)
    m = tl.load(addresses + row * COLUMNS + EXP_AVG)
    v = tl.load(addresses + row * COLUMNS + EXP_AVG_SQ)
    e = tl.load(addresses + row * COLUMNS + EMA)
    is_updated = (g != 0) & (tl.load(found_inf) == 0)
    count_by_four = tl.where((p | g | m | v | e) % 16 == 0, count // 4 * 4, 0)
    parameter = p.to(tl.pointer_type(tl.float32)) + first
    gradient = g.to(tl.pointer_type(tl.float32)) + first
    exp_avg = m.to(tl.pointer_type(tl.float32)) + first
    exp_avg_sq = v.to(tl.pointer_type(tl.float32)) + first
    ema = e.to(tl.pointer_type(tl.float32)) + first
    for start in range(0, count_by_four, BLOCK):
        i = start + tl.arange(0, BLOCK)
        update_block(
            parameter, gradient, exp_avg, exp_avg_sq, ema, i, i // 4 < count_by_four // 4, is_updated, scale, decay,
            step_size, correction2, beta1, rest1, beta2, rest2, eps, average_weight, HAS_EMA, True,
        )  # fmt: skip
    for start in range(count_by_four, count, SINGLES):
        i = start + tl.arange(0, SINGLES)
        update_block(
            parameter, gradient, exp_avg, exp_avg_sq, ema, i, i < count, is_updated, scale, decay,
            step_size, correction2, beta1, rest1, beta2, rest2, eps, average_weight, HAS_EMA, False,
        )  # fmt: skip


def sum_squares(chunks: Tensor, addresses: Tensor, sums: Tensor, *, chunk: int) -> None:
    """Store the sum of squares of each chunk of the gradients in `sums` (chunks)."""
    sum_squares_kernel[(len(chunks),)](chunks, addresses, sums, CHUNK=chunk, BLOCK=BLOCK, num_warps=NUM_WARPS)


def update(
    chunks: Tensor,
    addresses: Tensor,
    corrections: Tensor,
    settings: Tensor,
    grad_norm: Tensor,
    found_inf: Tensor,
    log_betas: Tensor,
    *,
    max_norm: float,
    betas: tuple[float, float],
    eps: float,
    ema_weight: Tensor | None,
    chunk: int,
) -> None:
    """Update all parameters with their moments and steps, unless `found_inf` is set, and then their EMA.

    Args:
        chunks: as above.
        addresses: as above.
        corrections: float32 (parameters, 2), overwritten.
        settings: float32 (groups, 2), learning rate and weight decay.
        grad_norm: float32 scalar, of the gradient before clipping.
        found_inf: float32 scalar, 0 or 1.
        log_betas: float64 (2), logarithms of `betas`.
        max_norm: largest norm of the gradient; infinity: no clipping.
        betas: AdamW's.
        eps: AdamW's.
        ema_weight: float32 scalar, 1 - decay; None without EMA.
        chunk: elements of a full chunk.
    """
    num_parameters = len(addresses)
    advance_kernel[(triton.cdiv(num_parameters, PARAMETERS),)](
        addresses, found_inf, log_betas, corrections, num_parameters, PARAMETERS=PARAMETERS
    )
    update_kernel[(len(chunks),)](
        *(chunks, addresses, corrections, settings, grad_norm, found_inf, max_norm),
        *(betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps),
        found_inf if ema_weight is None else ema_weight,  # not read without EMA
        CHUNK=chunk,
        BLOCK=BLOCK,
        HAS_EMA=ema_weight is not None,
        num_warps=NUM_WARPS,
    )

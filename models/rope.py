"""Two-dimensional rotary position embedding for tokens on a grid, in real arithmetic."""

import torch
from torch import Tensor

FREQUENCY_BASE = 10000.0


def rotary_tables(height: int, width: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which the channel pairs of a token turn.

    There are K = channels / 4 frequencies theta_j = 10000^(-j / K). The first K pairs of a token at (row, column)
    turn by row * theta_j, the last K pairs by column * theta_j.

    Args:
        height, width: the token grid.
        channels: width C of a token, all heads together; a multiple of 4.
        device: where the tables are made.

    Returns:
        cos and sin, float32, each (H, W, C / 2).

    Raises:
        ValueError: channels is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"rotary embedding needs a token width that is a multiple of 4, got {channels}")
    num_frequencies = channels // 4
    exponents = torch.arange(num_frequencies, device=device, dtype=torch.float32) / num_frequencies
    frequencies = FREQUENCY_BASE**-exponents  # (K,)
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies  # (H, K)
    columns = torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies  # (W, K)
    angles = torch.cat(
        (rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1
    )  # (H, W, C / 2)
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair (a, b) of x (..., C) into (a cos - b sin, a sin + b cos); cos and sin are (..., C / 2)."""
    first, second = x[..., 0::2], x[..., 1::2]  # (..., C / 2)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)  # (..., C)

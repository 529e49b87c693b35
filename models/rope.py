"""Two-dimensional rotary position embedding for tokens on a grid, in real arithmetic."""

import torch
from torch import Tensor

FREQUENCY_BASE = 10000.0


def position_tables(height: int, width: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, position * theta_j with theta_j = 10000^(-j / K), K = channels / 4.

    Args:
        height, width: the token grid; there are tables for as many positions as both together, which are enough for
            rows and for columns, and which exported graphs can add up.
        channels: width C of a token, all heads together; a multiple of 4.
        device: where the tables are made.

    Returns:
        cos and sin, float32, each (H + W, C / 4).

    Raises:
        ValueError: channels is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"rotary embedding needs a token width that is a multiple of 4, got {channels}")
    num_frequencies = channels // 4
    exponents = torch.arange(num_frequencies, device=device, dtype=torch.float32) / num_frequencies
    angles = torch.arange(height + width, device=device, dtype=torch.float32)[:, None] * FREQUENCY_BASE**-exponents
    return angles.cos(), angles.sin()


def spread_over_grid(table: Tensor, height: int, width: int) -> Tensor:
    """(positions, C / 4) to (H, W, C / 2): half of a token's pairs turn by its row, the others by its column."""
    rows = table[:height, None].expand(-1, width, -1)  # (H, W, C / 4)
    columns = table[None, :width].expand(height, -1, -1)  # (H, W, C / 4)
    return torch.cat((rows, columns), dim=-1)  # (H, W, C / 2)


def rotary_tables(height: int, width: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which the channel pairs of the tokens on a grid turn, float32, each (H, W, C / 2)."""
    cos, sin = position_tables(height, width, channels, device)
    return spread_over_grid(cos, height, width), spread_over_grid(sin, height, width)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair (a, b) of x (..., C) into (a cos - b sin, a sin + b cos); cos and sin are (..., C / 2)."""
    first, second = x[..., 0::2], x[..., 1::2]  # (..., C / 2)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)  # (..., C)

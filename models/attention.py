"""Linear attention with rotary embedding and local enhancement, the mixer of MLLA (paper section 4.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import TokenConv
from models.rope import rotate_pairs, spread_over_grid

NORMALIZER_EPS = 1e-6


class LinearAttention(nn.Module):
    """out = rope(q) (rope(k)^T v) / N / (q . mean(k)) + lepe(v), with q, k = ELU(linear(v)) + 1 and v the input itself.

    Cost is linear in the number of tokens N. The normalizer uses q and k before rotation.

    Args:
        dim: token width C.
        num_heads: heads; must divide dim.
        qkv_bias: add a bias in the projection to q and k.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a token width of {dim}")
        self.dim, self.num_heads = dim, num_heads
        self.qk = nn.Linear(dim, dim * 2, bias=qkv_bias)
        self.lepe = TokenConv(dim)

    def forward(self, v: Tensor, gate: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return (attention + lepe) SiLU(gate) for v and gate (B, H, W, C); `rotary`: see `position_tables`."""
        return (self.attend(v, rotary) + self.lepe(v)) * F.silu(gate)

    def attend(self, v: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return the attention alone, (B, H, W, C) -> (B, H, W, C)."""
        batch, height, width, channels = v.shape
        num_tokens = height * width
        cos, sin = (spread_over_grid(table, height, width) for table in rotary)  # (H, W, C / 2) each

        # ELU + 1 of a negative number is small and would lose its digits in 16 bits, so it is computed in float32.
        qk = self.qk(v)
        qk = F.elu(qk.float() if qk.dtype in (torch.float16, torch.bfloat16) else qk) + 1
        q, k = qk.chunk(2, dim=-1)  # (B, H, W, C) each

        q_heads = self.split_heads(q)  # (B, heads, N, head_dim)
        mean_k = self.split_heads(k.mean(dim=(1, 2), keepdim=True))  # (B, heads, 1, head_dim)
        normalizer = (q_heads * mean_k).sum(dim=-1, keepdim=True) + NORMALIZER_EPS  # (B, heads, N, 1)

        # Half of 1 / N goes into k's rotary table, half into the small product, so that float16 sums do not overflow.
        scale = num_tokens**-0.5
        q_rotated = self.split_heads(rotate_pairs(q, cos, sin))  # (B, heads, N, head_dim)
        k_rotated = self.split_heads(rotate_pairs(k, cos * scale, sin * scale))  # (B, heads, N, head_dim)
        kv = k_rotated.transpose(-2, -1) @ self.split_heads(v).to(k_rotated.dtype)  # (B, heads, head_dim, head_dim)
        out = q_rotated @ (kv * scale).to(q_rotated.dtype) / normalizer  # (B, heads, N, head_dim)
        return out.transpose(1, 2).reshape(batch, height, width, channels).to(v.dtype)  # (B, H, W, C)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, heads, H * W, C / heads), a view."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

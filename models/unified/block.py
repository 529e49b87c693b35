"""Blocks around the unified operator: a Transformer's, or Mamba's gated one with or without an MLP after it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from models.layers import TokenConv
from models.rope import rotate_pairs
from models.unified.ssm import ForgetGate, unified_attention

BLOCK_DESIGNS = ("transformer", "sub", "all")
GATE_RANK_DIVISOR = 16  # W1 is C x C / 16, as Mamba's
MAMBA_STEPS = 1e-3, 0.1  # Mamba draws its first Delta from here, evenly by logarithm
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Switches:
    """What a model takes over from Mamba (table 1 of the paper), and what replaces the forget gate (table 2).

    Args:
        input_gate: multiply V by Delta = softplus(x W1 W2 + b).
        forget_gate: let the state decay by exp(A Delta); the tokens are then read in raster order.
        shortcut: add D * V.
        normalize: divide by Q Z.
        single_head: one group of Q and K for all channels.
        block: "transformer"; "sub" puts Mamba's gated block in place of the attention sub-block; "all" puts one of
            twice the width in place of the whole block, MLP included.
        ape: a learned table of positions added before each block.
        lepe: a depthwise convolution of V added to the output.
        cpe: a depthwise convolution added before attention and before the MLP.
        rope: rotate Q and K by their tokens' rows and columns.

    Raises:
        ValueError: an unknown block.
    """

    input_gate: bool = False
    forget_gate: bool = False
    shortcut: bool = False
    normalize: bool = True
    single_head: bool = False
    block: str = "transformer"
    ape: bool = False
    lepe: bool = False
    cpe: bool = False
    rope: bool = False

    def __post_init__(self) -> None:
        if self.block not in BLOCK_DESIGNS:
            raise ValueError(f"block {self.block!r}: must be one of {', '.join(BLOCK_DESIGNS)}")


class Gate(nn.Module):
    """Delta = softplus(x W1 W2 + b) of tokens (..., C): (..., C) in float32 at least, positive and finite."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        rank = max(1, dim // GATE_RANK_DIVISOR)
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.up(self.down(x))
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float().clamp(max=torch.finfo(torch.float16).max)  # where 16 bits overflowed
        return F.softplus(logits)

    @torch.no_grad()
    def reset(self, *, as_mamba: bool) -> None:
        """Let Delta start from Mamba's range, whose decays remember 10 to 1000 tokens, or open, at 1."""
        low, high = MAMBA_STEPS if as_mamba else (1.0, 1.0)
        start = torch.empty_like(self.up.bias).uniform_(math.log(low), math.log(high)).exp()
        self.up.bias.copy_(start + torch.log(-torch.expm1(-start)))  # softplus of this is `start`


class UnifiedAttention(nn.Module):
    """`unified_attention` on tokens, with the projection to q and k, the gates and the position encodings switched on.

    q, k = ELU(linear(x)) + 1, as in MLLA; rotary embedding turns them over their whole width, before the heads.

    Args:
        dim: width C of the values.
        num_heads: heads of q and k; with switches.single_head there is one, of the same width d.
        head_dim: width d of a head.
        switches: what is on.
        qkv_bias: whether the projection to q and k has a bias.
        kernels: "torch"; "auto" for Triton kernels of the forget gate where they can run; "triton".
    """

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, switches: Switches, qkv_bias: bool = True, kernels: str = "torch"
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.num_heads = 1 if switches.single_head else num_heads
        self.switches = switches
        self.qk = nn.Linear(dim, 2 * self.num_heads * head_dim, bias=qkv_bias)
        self.gate = Gate(dim) if switches.input_gate or switches.forget_gate else None
        # As Mamba starts: row i of the state decays i + 1 times as fast as row 0.
        rows = torch.arange(1, head_dim + 1, dtype=torch.get_default_dtype())[:, None].expand(-1, dim)  # (d, C)
        self.A_log = nn.Parameter(rows.log()) if switches.forget_gate else None
        self.D = nn.Parameter(torch.ones(dim)) if switches.shortcut else None
        self.lepe = TokenConv(dim) if switches.lepe else None

    def forward(self, x: Tensor, v: Tensor, rotary: Rotary | None = None) -> Tensor:
        """x (B, H, W, C) gives q, k and Delta, v (B, H, W, C) the values -> (B, H, W, C)."""
        out = self.exchange(x, v, rotary, self.D)
        return out if self.lepe is None else out + self.lepe(v)

    def exchange(self, x: Tensor, v: Tensor, rotary: Rotary | None, shortcut: Tensor | None = None) -> Tensor:
        """The operator alone: what each token reads of all, plus `shortcut` (C,) times v; shapes as in `forward`."""
        q, k = self.queries_and_keys(x)  # (B, H, W, heads * d) each
        rotated = None
        if rotary is not None:
            cos, sin = rotary
            rotated = self.split_heads(rotate_pairs(q, cos, sin)), self.split_heads(rotate_pairs(k, cos, sin))
        delta = None if self.gate is None else self.split_heads(self.gate(x))  # (B, heads, N, e)
        out = unified_attention(
            self.split_heads(q),
            self.split_heads(k),
            self.split_heads(v),
            input_gate=delta if self.switches.input_gate else None,
            forget_gate=None if delta is None or self.A_log is None else ForgetGate(delta, self.decay_rates()),
            shortcut=None if shortcut is None else shortcut.unflatten(0, (self.num_heads, 1, -1)),
            normalize=self.switches.normalize,
            rotated=rotated,
            kernels=self.kernels,
        )
        return out.transpose(1, 2).reshape(v.shape)  # (B, H, W, C)

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k of tokens (B, H, W, C), (B, H, W, heads * d) each, in float32 at least."""
        qk = self.qk(x)
        qk = F.elu(qk.float() if qk.dtype in (torch.float16, torch.bfloat16) else qk) + 1
        q, k = qk.chunk(2, dim=-1)
        return q, k

    def decay_rates(self) -> Tensor:
        """A, negative, (heads, d, e)."""
        assert self.A_log is not None
        return -self.A_log.exp().unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, H, W, width) -> (B, heads, H * W, width / heads), a view."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def reset_gate(self) -> None:
        if self.gate is not None:
            self.gate.reset(as_mamba=self.switches.forget_gate)


class PositionTable(nn.Module):
    """Adds a learned vector for each place of a token grid; bicubic for other grids than the one it was made for."""

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))
        nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        table = self.absolute_pos_embed.unflatten(1, self.grid)  # (1, H, W, C)
        if tokens.shape[1:3] != self.grid:
            table = F.interpolate(table.permute(0, 3, 1, 2), tokens.shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
        return tokens + table


class UnifiedBlock(nn.Module):
    """A residual block on tokens (B, H, W, C); `switches.block` says which. Parts that are off are identities.

    Args:
        dim: token width C.
        num_heads: heads; a head's width is C / num_heads, in a block of twice the width too.
        grid: token grid that a table of positions is made for.
        switches: what is on.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        switches: Switches,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        kernels: str = "torch",
    ) -> None:
        super().__init__()
        self.is_gated = switches.block != "transformer"
        self.has_mlp = switches.block != "all"
        expansion = 1 if self.has_mlp else 2
        inner = dim * expansion
        self.ape = PositionTable(grid, dim) if switches.ape else nn.Identity()
        self.cpe1 = TokenConv(dim) if switches.cpe else None
        self.norm1 = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, inner, bias=self.is_gated or qkv_bias)  # a Transformer's projection to V
        if self.is_gated:
            self.act_proj = nn.Linear(dim, inner)
            self.dwc = TokenConv(inner)
        self.attn = UnifiedAttention(inner, num_heads * expansion, dim // num_heads, switches, qkv_bias, kernels)
        self.out_proj = nn.Linear(inner, dim)
        self.drop_path = DropPath(drop_path)
        if self.has_mlp:
            self.cpe2 = TokenConv(dim) if switches.cpe else None
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        x = self.ape(x)
        if self.cpe1 is not None:
            x = x + self.cpe1(x)
        x = x + self.drop_path(self.mix(self.norm1(x), rotary))
        if not self.has_mlp:
            return x
        if self.cpe2 is not None:
            x = x + self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mix(self, y: Tensor, rotary: Rotary | None) -> Tensor:
        """The tokens' exchange: normalized tokens (B, H, W, C) -> (B, H, W, C)."""
        if not self.is_gated:
            return self.out_proj(self.attn(y, self.in_proj(y), rotary))
        gate = F.silu(self.act_proj(y))  # (B, H, W, inner)
        v = F.silu(self.dwc(self.in_proj(y)))  # (B, H, W, inner)
        return self.out_proj(self.attn(v, v, rotary) * gate)

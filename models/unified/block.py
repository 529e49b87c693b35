"""Blocks around the unified operator (paper eq. 11 and 12): Transformer and Mamba designs."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from models.layers import TokenConv
from models.rope import rotate_pairs
from models.unified.scan import gated_scan
from models.unified.ssm import ForgetGate, unified_attention

BLOCK_DESIGNS = ("transformer", "sub", "all")
GATE_RANK_DIVISOR = 16  # W1 is C x C / 16, as in Mamba
MAMBA_DELTA_RANGE = 1e-3, 0.1  # Mamba initializes Delta log-uniformly in this range
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Switches:
    """Components of Mamba (table 1 of the paper) and replacements of its forget gate (table 2) that a model has.

    Args:
        input_gate: multiply V by Delta = softplus(x W1 W2 + b).
        forget_gate: decay the state by exp(A Delta); makes attention causal, over tokens in raster order.
        shortcut: add D * V to the output.
        normalize: divide by Q Z.
        single_head: one group of Q and K for all channels.
        block: "transformer"; "sub": Mamba's gated block replaces the attention sub-block; "all": a gated block of twice
            the width replaces the whole block, MLP included.
        ape: add a learned absolute position embedding before each block.
        lepe: add a depthwise convolution of V to the output.
        cpe: add a depthwise convolution before attention and before the MLP.
        rope: rotate Q and K by the rows and columns of their tokens.

    Raises:
        ValueError: unknown block.
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
    """Delta = softplus(x W1 W2 + b) of tokens (..., C): (..., C), positive and finite, in float32 or better."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        rank = max(1, dim // GATE_RANK_DIVISOR)
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.up(self.down(x))
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float().clamp(max=torch.finfo(torch.float16).max)  # in case 16 bits overflowed
        return F.softplus(logits)

    @torch.no_grad()
    def reset(self, *, as_mamba: bool) -> None:
        """Initialize b so that Delta starts in Mamba's range, a memory of 10 to 1000 tokens, or else at 1."""
        low, high = MAMBA_DELTA_RANGE if as_mamba else (1.0, 1.0)
        start = torch.empty_like(self.up.bias).uniform_(math.log(low), math.log(high)).exp()
        self.up.bias.copy_(start + torch.log(-torch.expm1(-start)))  # softplus of this is `start`


class UnifiedAttention(nn.Module):
    """`unified_attention` on a token grid, with projections to q and k, gates and position encodings by `switches`.

    q, k = ELU(linear(x)) + 1, as in MLLA; rotary embedding rotates them over their whole width, before they are split
    into heads.

    Args:
        dim: width C of the values.
        num_heads: heads of q and k; with switches.single_head there is one, of the same width.
        head_dim: width d of a head of q and k.
        switches: components.
        qkv_bias: bias of the projection to q and k.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, switches: Switches, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = 1 if switches.single_head else num_heads
        self.switches = switches
        self.qk = nn.Linear(dim, 2 * self.num_heads * head_dim, bias=qkv_bias)
        self.gate = Gate(dim) if switches.input_gate or switches.forget_gate else None
        # Mamba's initialization: row i of the state decays i + 1 times as fast as row 0.
        rows = torch.arange(1, head_dim + 1, dtype=torch.get_default_dtype())[:, None].expand(-1, dim)  # (d, C)
        self.A_log = nn.Parameter(rows.log()) if switches.forget_gate else None
        self.D = nn.Parameter(torch.ones(dim)) if switches.shortcut else None
        self.lepe = TokenConv(dim) if switches.lepe else None

    def forward(self, x: Tensor, v: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Attention and LePE, (B, H, W, C): q, k and Delta from x (B, H, W, C), values v (B, H, W, C)."""
        out = self.attend(x, v, rotary, self.D)
        return out if self.lepe is None else out + self.lepe(v)

    def attend(self, x: Tensor, v: Tensor, rotary: Rotary | None, shortcut: Tensor | None = None) -> Tensor:
        """Attention alone, (B, H, W, C), plus `shortcut` (C,) times v; arguments are those of `forward`."""
        q, k = self.project_qk(x)  # (B, H, W, heads * d) each
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
            scan=self.scan,
        )
        return out.transpose(1, 2).reshape(v.shape)  # (B, H, W, C)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> Tensor:
        """Compute the recurrence of the forget gate, see `gated_scan`; models/kernels/scan.py overrides it."""
        return gated_scan(q, k, v, delta, a)

    def project_qk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens (B, H, W, C) to q and k, (B, H, W, heads * d) each, in float32 or better."""
        qk = self.qk(x)
        qk = F.elu(qk.float() if qk.dtype in (torch.float16, torch.bfloat16) else qk) + 1
        q, k = qk.chunk(2, dim=-1)
        return q, k

    def decay_rates(self) -> Tensor:
        """Return A = -exp(A_log), (heads, d, e)."""
        assert self.A_log is not None
        return -self.A_log.exp().unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, H, W, width) -> (B, heads, H * W, width / heads), a view."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def reset_gate(self) -> None:
        """Initialize Delta: in Mamba's range with a forget gate, else at 1, an open input gate."""
        if self.gate is not None:
            self.gate.reset(as_mamba=self.switches.forget_gate)


class AbsolutePositionEmbedding(nn.Module):
    """Adds a learned vector for each token of `grid` (H, W); bicubic interpolation gives those of other grids."""

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
    """Residual block on tokens (B, H, W, C), of the design `switches.block`.

    Args:
        dim: token width C.
        num_heads: heads; their width is C / num_heads, also in a block of twice the width.
        grid: token grid (H, W) of the absolute position embedding.
        switches: components.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: bias of the projections to q and k, and in a Transformer block to v.
        drop: dropout rate of the MLP.
        drop_path: stochastic depth rate.
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
    ) -> None:
        super().__init__()
        self.is_gated = switches.block != "transformer"
        self.has_mlp = switches.block != "all"
        expansion = 1 if self.has_mlp else 2
        inner = dim * expansion
        self.ape = AbsolutePositionEmbedding(grid, dim) if switches.ape else nn.Identity()
        self.cpe1 = TokenConv(dim) if switches.cpe else None
        self.norm1 = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, inner, bias=self.is_gated or qkv_bias)  # in a Transformer block, to v
        if self.is_gated:
            self.act_proj = nn.Linear(dim, inner)
            self.dwc = TokenConv(inner)
        self.attn = UnifiedAttention(inner, num_heads * expansion, dim // num_heads, switches, qkv_bias)
        self.out_proj = nn.Linear(inner, dim)
        self.drop_path = DropPath(drop_path)
        if self.has_mlp:
            self.cpe2 = TokenConv(dim) if switches.cpe else None
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); `rotary` holds cos and sin of `rotary_tables` if switches.rope."""
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
        """Token mixer, paper section 4: normalized tokens (B, H, W, C) -> (B, H, W, C)."""
        if not self.is_gated:
            return self.out_proj(self.attn(y, self.in_proj(y), rotary))
        gate = F.silu(self.act_proj(y))  # (B, H, W, inner)
        v = F.silu(self.dwc(self.in_proj(y)))  # (B, H, W, inner)
        return self.out_proj(self.attn(v, v, rotary) * gate)

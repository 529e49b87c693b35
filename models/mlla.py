"""MLLA, Mamba-Like Linear Attention (Han et al., NeurIPS 2024, arXiv 2405.16605): block, stages, network."""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp, to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import LinearAttention
from models.layers import Downsample, DropPath, Stem, TokenConv
from models.rope import position_tables
from models.timm_interface import DERIVED_KEY_SUFFIX, TimmInterface, init_weights


class MLLABlock(nn.Module):
    """The paper's block (figure 3): linear attention inside Mamba's gated block, then an MLP."""

    is_region = True  # torch.compile makes one graph of it

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.cpe1 = TokenConv(dim)
        self.norm1 = norm_layer(dim)
        self.in_proj = nn.Linear(dim, dim)
        self.act_proj = nn.Linear(dim, dim)
        self.dwc = TokenConv(dim)
        self.attn = LinearAttention(dim, num_heads, qkv_bias)
        self.out_proj = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path)
        self.cpe2 = TokenConv(dim)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C); `rotary` holds (cos, sin) of `position_tables`."""
        return self.mix_channels(self.mix_tokens(x, rotary))

    def mix_tokens(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Add the attention branch, (B, H, W, C) -> (B, H, W, C)."""
        x = x + self.cpe1(x)
        y = self.norm1(x)
        v = F.silu(self.dwc(self.in_proj(y)))
        return x + self.drop_path(self.out_proj(self.attn(v, self.act_proj(y), rotary)))

    def mix_channels(self, x: Tensor) -> Tensor:
        """Add the MLP branch, (B, H, W, C) -> (B, H, W, C)."""
        x = x + self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one resolution; `downsample` leads to the next stage and is None in the last one."""

    def __init__(self, blocks: list[MLLABlock], dim: int, *, downsample: bool, use_checkpoint: bool) -> None:
        super().__init__()
        self.dim = dim
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = Downsample(dim) if downsample else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (B, H, W, C) of any grid to the blocks' output (B, H, W, C) and the input of the next stage.

        The latter is (B, ceil(H / 2), ceil(W / 2), 2 C), or in the last stage the same as the output.
        """
        rotary = self.rotary(x)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return x, x if self.downsample is None else self.downsample(x)

    def rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of `position_tables`, (H + W, C / 4) each, for tokens x (B, H, W, C)."""
        return position_tables(x.shape[1], x.shape[2], self.dim, x.device)


class MLLA(TimmInterface):
    """Classifier for images (B, in_chans, H, W) of any H and W; returns logits (B, num_classes).

    Zeros are padded at the right and the bottom of sizes that 32 does not divide: the image to a multiple of 4, the
    tokens to an even grid before each downsampling. Parameters have the names of the released weights. On a GPU,
    `models.kernels.fused_modules.use_kernels` replaces the forward pass of the parts by Triton kernels.

    Args:
        img_size: side, or height and width, in pixels, for which the table of `ape` is made; it is interpolated for
            other sizes.
        patch_size: stride of the stem; 4, since the stem is convolutional.
        in_chans: channels of an image.
        num_classes: width of the classifier; 0 leaves it out, and the model returns features (B, C).
        embed_dim: token width of the first stage; it doubles with each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratio: hidden width of the MLP over its input width.
        qkv_bias: bias of the projection to q and k.
        drop_rate: dropout after the stem and in the MLPs.
        drop_path_rate: stochastic depth of the last block; the rate rises linearly from 0 over the blocks.
        norm_layer: makes a token norm from its width.
        ape: add a learned absolute position embedding after the stem.
        use_checkpoint: activation checkpointing: recompute each block in the backward pass, to save memory.
        global_pool: how the last tokens become one vector: avg as in the paper, max, avgmax, catavgmax, or "" for none.

    Raises:
        ValueError: patch_size is not 4, depths and num_heads differ in length, a stage's heads do not divide its
            width, a width is not a multiple of 4, or an unknown global_pool.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        ape: bool = False,
        use_checkpoint: bool = False,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if patch_size != 4:
            raise ValueError(f"patch_size is 4 in MLLA, whose stem has stride 4; got {patch_size}")
        if len(depths) != len(num_heads):
            raise ValueError(f"depths {list(depths)} and num_heads {list(num_heads)} differ in length")
        self.widths = [embed_dim * 2**i for i in range(len(depths))]
        for i, (width, heads) in enumerate(zip(self.widths, num_heads, strict=True)):
            if heads < 1 or width % heads or width % 4:
                raise ValueError(
                    f"stage {i} is {width} wide (embed_dim {embed_dim}): {heads} heads must divide it, and so must 4; "
                    f"change num_heads or embed_dim"
                )
        self.in_chans = in_chans
        self.num_features = self.widths[-1]

        self.patch_embed = Stem(in_chans, embed_dim)
        self.grid = tuple(-(-side // patch_size) for side in to_2tuple(img_size))
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, prod(self.grid), embed_dim)) if ape else None
        self.pos_drop = nn.Dropout(drop_rate)

        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList()
        for i, (width, heads) in enumerate(zip(self.widths, num_heads, strict=True)):
            blocks = [
                MLLABlock(width, heads, mlp_ratio, qkv_bias, drop_rate, drop_path, norm_layer)
                for drop_path in rates[i].tolist()
            ]
            is_last = i == len(depths) - 1
            self.layers.append(Stage(blocks, width, downsample=not is_last, use_checkpoint=use_checkpoint))
        self.norm = norm_layer(self.num_features)
        self.make_classifier(num_classes, global_pool)

        self.apply(init_weights)
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.register_load_state_dict_pre_hook(drop_derived_keys)

    @property
    def stages(self) -> Iterable[Stage]:
        return cast("Iterable[Stage]", self.layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the last stage's normalized tokens, (B, H / 32, W / 32, num_features)."""
        x = self.embed(images)  # (B, H / 4, W / 4, embed_dim)
        for stage in self.stages:
            x = stage(x)[1]  # (B, H / 2, W / 2, 2 C) but for the last
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens (B, H, W, C) to logits (B, num_classes), or if pre_logits to one vector (B, head_hidden_size)."""
        x = self.global_pool(x)  # (B, C), the mean in the paper
        return x if pre_logits else self.head(x)

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the first stage's tokens, (B, ceil(H / 4), ceil(W / 4), embed_dim)."""
        x = self.patch_embed(images)  # (B, H, W, C)
        if self.absolute_pos_embed is not None:
            x = x + self.position_table(x.shape[1], x.shape[2])
        return self.pos_drop(x)

    def position_table(self, height: int, width: int) -> Tensor:
        """Return the learned position embedding (1, height, width, embed_dim), interpolated if necessary."""
        assert self.absolute_pos_embed is not None
        table = self.absolute_pos_embed.unflatten(1, self.grid)  # (1, rows, columns, E)
        if (height, width) != self.grid:
            table = F.interpolate(table.permute(0, 3, 1, 2), (height, width), mode="bicubic").permute(0, 2, 3, 1)
        return table


def drop_derived_keys(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Drop the rotary tables of official files before loading; load_state_dict works on a copy of the dictionary."""
    for key in [k for k in state_dict if k.startswith(prefix) and k.endswith(DERIVED_KEY_SUFFIX)]:
        del state_dict[key]

"""LinearViT, the network of the paper's tables 1 and 2: Swin's pyramid with the unified operator."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import channels_last, pad_to_multiple
from models.rope import rotary_tables
from models.timm_interface import PyramidClassifier, init_weights
from models.unified.block import Switches, UnifiedAttention, UnifiedBlock

NOT_DECAYED = ("absolute_pos_embed", "A_log")


class PatchEmbed(nn.Module):
    """Images (B, in_chans, H, W), H and W multiples of patch_size, to tokens (B, H / patch, W / patch, embed_dim)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))  # (B, H / patch, W / patch, E)


class PatchMerging(nn.Module):
    """Swin's downsampling: merges 2x2 tokens, (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = pad_to_multiple(tokens.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)  # (B, H, W, C), both even
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)  # (B, H / 2, W / 2, 2, 2, C)
        return self.reduction(self.norm(x.flatten(3)))  # (B, H / 2, W / 2, 2 C)


class UnifiedStage(nn.Module):
    """Blocks at one resolution, then `downsample`, which is None in the last stage."""

    def __init__(self, blocks: list[UnifiedBlock], downsample: PatchMerging | None, use_checkpoint: bool) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C), in the last stage (B, H, W, C)."""
        attention = cast("UnifiedAttention", self.blocks[0].attn)
        rotary = None
        if attention.switches.rope:
            rotary = rotary_tables(x.shape[1], x.shape[2], attention.qk.out_features // 2, x.device)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return x if self.downsample is None else self.downsample(x)


class LinearViT(PyramidClassifier):
    """Classifier of images (B, in_chans, H, W), of any H and W, to logits (B, num_classes).

    The defaults are the paper's baseline: Swin-T with linear attention in place of window attention. Sizes that are not
    multiples of 8 * patch_size are zero-padded at the right and the bottom: images to a multiple of patch_size, tokens
    to an even grid before each downsampling.

    Args:
        img_size: image side in pixels that absolute position embeddings are made for; interpolated for others.
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        num_classes: classes; 0 for no classifier, the output is then features (B, C).
        embed_dim: token width of the first stage; doubles with each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratio: hidden width of the MLP over its input width.
        qkv_bias: bias of the projections to q and k, and in a Transformer block to v.
        drop_rate: dropout after the patch embedding and in the MLPs.
        drop_path_rate: stochastic depth rate of the last block; rises linearly from 0 over the blocks.
        use_checkpoint: activation checkpointing of each block.
        switches: differences from the baseline; None for none.

    Raises:
        ValueError: depths and num_heads differ in length, a stage's heads do not divide its width, or q and k that
            rotary embedding rotates have a width that is not a multiple of 4.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        use_checkpoint: bool = False,
        switches: Switches | None = None,
    ) -> None:
        super().__init__()
        switches = switches or Switches()
        if len(depths) != len(num_heads):
            raise ValueError(f"depths {list(depths)} and num_heads {list(num_heads)} differ in length")
        widths = [embed_dim * 2**i for i in range(len(depths))]
        for i, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
            check_heads(i, width, heads, switches)
        self.patch_size = patch_size
        self.num_features = widths[-1]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.pos_drop = nn.Dropout(drop_rate)

        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        side = -(-img_size // patch_size)
        self.layers = nn.ModuleList()
        for i, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
            settings = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "drop": drop_rate}
            blocks = [
                UnifiedBlock(width, heads, (side, side), switches, drop_path=rate, **settings)  # type: ignore[arg-type]
                for rate in rates[i].tolist()
            ]
            is_last = i == len(depths) - 1
            self.layers.append(UnifiedStage(blocks, None if is_last else PatchMerging(width), use_checkpoint))
            side = -(-side // 2)
        self.norm = nn.LayerNorm(self.num_features)
        self.make_classifier(num_classes)
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, UnifiedAttention):
                module.reset_gate()

    @property
    def stages(self) -> Iterable[UnifiedStage]:
        return cast("Iterable[UnifiedStage]", self.layers)

    def no_weight_decay(self) -> set[str]:
        """Return the names of further parameters without weight decay: absolute position embeddings and A."""
        return {name for name, _ in self.named_parameters() if name.endswith(NOT_DECAYED)}

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalized tokens of the last stage, (B, H / 32, W / 32, num_features)."""
        x = channels_last(pad_to_multiple(images, self.patch_size))
        x = self.pos_drop(self.patch_embed(x))  # (B, H / 4, W / 4, E)
        for stage in self.stages:
            x = stage(x)  # (B, H / 2, W / 2, 2 C), in the last stage (B, H, W, C)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens (B, H, W, C) to logits (B, num_classes), or if pre_logits to one vector (B, head_hidden_size)."""
        x = self.global_pool(x)  # (B, C)
        return x if pre_logits else self.head(x)


def check_heads(stage: int, width: int, heads: int, switches: Switches) -> None:
    """Raise ValueError unless a stage's heads fit its width and rotary embedding."""
    if heads < 1 or width % heads:
        raise ValueError(
            f"stage {stage} is {width} wide, which {heads} heads do not divide; change num_heads or embed_dim"
        )
    key_width = width // heads if switches.single_head else width
    if switches.rope and key_width % 4:
        raise ValueError(f"stage {stage}: q is {key_width} wide; rotary embedding needs a multiple of 4: fewer heads")

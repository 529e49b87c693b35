"""Views into a trained model: its gates, attention maps, and effective receptive fields."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import NORMALIZER_EPS, LinearAttention
from models.rope import rotate_pairs, spread_over_grid
from models.unified.block import UnifiedAttention


class LayerInput(NamedTuple):
    """An attention layer with its input: tokens x (B, H, W, C), and rotary tables if it rotates q and k."""

    name: str
    layer: nn.Module
    x: Tensor
    rotary: tuple[Tensor, Tensor] | None


class GateValues(NamedTuple):
    """Gates of one layer: Delta averaged over channels, (B, H, W), and the forget gate averaged per image, (B,)."""

    name: str
    delta: Tensor
    forget: Tensor | None


@torch.no_grad()
def attention_inputs(model: nn.Module, images: Tensor) -> list[LayerInput]:
    """Return every attention layer of MLLA or LinearViT, in order, with its input for images (B, 3, H, W)."""
    seen: list[LayerInput] = []
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, LinearAttention | UnifiedAttention):
            _, stage, _, block, _ = name.split(".")  # layers.S.blocks.I.attn
            short = f"stage {int(stage) + 1}, block {int(block) + 1}"

            def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = short) -> None:
                seen.append(LayerInput(name, module, args[0], args[-1] if isinstance(args[-1], tuple) else None))

            handles.append(layer.register_forward_pre_hook(keep))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def gate_values(model: nn.Module, images: Tensor) -> list[GateValues]:
    """Return the gates of every layer that has some, for images (B, 3, H, W); the values of figure 4 of the paper."""
    found = []
    for name, layer, x, _ in attention_inputs(model, images):
        if isinstance(layer, UnifiedAttention) and layer.gate is not None:
            delta = layer.gate(x)  # (B, H, W, C)
            forget = None
            if layer.A_log is not None:
                by_row = [torch.exp(-rates.exp() * delta).mean(dim=(1, 2, 3)) for rates in layer.A_log]
                forget = torch.stack(by_row).mean(dim=0)  # (B,)
            found.append(GateValues(name, delta.mean(dim=-1), forget))
    return found


def attention_map(layer_input: LayerInput, query: tuple[int, int], *, rotate: bool = True) -> Tensor:
    """Return the attention weights of one query token, which linear attention never computes explicitly.

    Args:
        layer_input: a layer and its input.
        query: row and column of the query token.
        rotate: False leaves the rotary embedding out, with the same q and k.

    Returns:
        (B, heads, H, W), the mean over a head's channels where gates make them differ. The local and shortcut terms,
        LePE and D, are left out. Rotation can make weights negative.
    """
    rotary = layer_input.rotary if rotate else None
    if isinstance(layer_input.layer, UnifiedAttention):
        return unified_map(layer_input.layer, layer_input.x, rotary, query)
    assert isinstance(layer_input.layer, LinearAttention)
    return linear_map(layer_input.layer, layer_input.x, rotary, query)


@torch.no_grad()
def linear_map(
    layer: LinearAttention, x: Tensor, rotary: tuple[Tensor, Tensor] | None, query: tuple[int, int]
) -> Tensor:
    """Return rope(q_t) . rope(k_s) / N / (q_t . mean(k) + eps) of MLLA's attention, (B, heads, H, W)."""
    row, column = query
    q, k = (F.elu(layer.qk(x).float()) + 1).chunk(2, dim=-1)  # (B, H, W, C) each
    if rotary is None:
        q_rotated, k_rotated = q, k
    else:
        cos, sin = (spread_over_grid(table, k.shape[1], k.shape[2]) for table in rotary)  # (H, W, C / 2) each
        q_rotated, k_rotated = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
    heads = (layer.num_heads, -1)
    reader, query_rotated = (y[:, row, column].unflatten(-1, heads) for y in (q, q_rotated))  # (B, heads, d)
    normalizer = (reader * k.mean(dim=(1, 2)).unflatten(-1, heads)).sum(dim=-1) + NORMALIZER_EPS  # (B, heads)
    weights = torch.einsum("bgd,bhwgd->bghw", query_rotated, k_rotated.unflatten(-1, heads))  # (B, heads, H, W)
    return weights / (k.shape[1] * k.shape[2]) / normalizer[..., None, None]


def unified_map(
    layer: UnifiedAttention, x: Tensor, rotary: tuple[Tensor, Tensor] | None, query: tuple[int, int]
) -> Tensor:
    """Return the weights (B, heads, H, W) as a gradient: the output at the query is linear in v."""
    row, column = query
    v = torch.zeros_like(x, requires_grad=True)  # as wide as x
    with torch.enable_grad():
        read = layer.attend(x.detach(), v, rotary)[:, row, column]  # (B, C)
        (weights,) = torch.autograd.grad(read.sum(), v)  # (B, H, W, C)
    return weights.unflatten(-1, (layer.num_heads, -1)).mean(dim=-1).permute(0, 3, 1, 2)  # (B, heads, H, W)


def receptive_fields(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the effective receptive field (Luo et al., 2016) of the central token of each stage's output.

    That is the absolute gradient of the token with respect to the images (B, 3, H, W), summed over colors: for each
    stage (B, H, W), scaled to a maximum of 1.
    """
    outputs: list[Tensor] = []
    last_blocks: Sequence[nn.Module] = [stage.blocks[-1] for stage in model.stages]  # type: ignore[union-attr,operator]
    handles = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in last_blocks]
    images = images.detach().requires_grad_()
    try:
        with torch.enable_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    fields = []
    for tokens in outputs:
        middle = tokens[:, tokens.shape[1] // 2, tokens.shape[2] // 2]  # (B, C)
        (grad,) = torch.autograd.grad(middle.sum(), images, retain_graph=True)
        field = grad.abs().sum(dim=1)  # (B, H, W)
        fields.append(field / field.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(field.dtype).tiny))
    return fields

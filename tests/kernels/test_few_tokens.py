"""The kernels for few tokens in all their tiles, and where a prepared block takes them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import prepare_for_inference, use_kernels
from models.kernels import dispatch, inference
from models.mlla import MLLABlock
from models.rope import position_tables

few_tokens = pytest.importorskip("models.kernels.triton.few_tokens", exc_type=ImportError)
launch = pytest.importorskip("models.kernels.triton.launch", exc_type=ImportError)
problems = pytest.importorskip("models.kernels.problems", exc_type=ImportError)
ops = pytest.importorskip("models.kernels.ops", exc_type=ImportError)
Tile, AttentionTile = few_tokens.Tile, few_tokens.AttentionTile


@pytest.fixture
def draw(device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", [Tile(16, 16, 4), Tile(32, 64, 4, 4)], ids=str)
@pytest.mark.parametrize("longest", [64, 2048])
def test_product_and_residual(draw: Any, monkeypatch: pytest.MonkeyPatch, tile: Any, longest: int) -> None:
    """Of 100 inputs, in one piece of 128 or two of 64, which warps share or not."""
    monkeypatch.setattr(few_tokens, "LONGEST_INPUT", longest)
    x, weight, bias, residual = draw(1, 5, 7, 100), draw(24, 100), draw(24), draw(1, 5, 7, 24)
    expected = residual.double() + F.linear(x.double(), weight.double(), bias.double())
    near(few_tokens.linear_add(x, weight, bias, residual, tile), expected)


@pytest.mark.parametrize("tile", [Tile(16, 16, 4), Tile(32, 64, 4)], ids=str)
@pytest.mark.parametrize("has_norm", [True, False])
def test_convolution_and_product(draw: Any, tile: Any, has_norm: bool) -> None:
    """Of a slice of wider tokens, of two images, without bias where there is no norm."""
    x, taps, bias = draw(2, 5, 7, 80)[..., 40:], draw(40, 1, 3, 3), draw(40)
    weight, scale, shift, later = draw(72, 40), draw(40), draw(40), draw(72) if has_norm else None
    norm = (scale, shift, problems.EPS) if has_norm else None
    y, out = few_tokens.conv_linear(x, taps, bias, weight, later, tile, norm=norm, use_gelu=has_norm)
    convolved = problems.conv(x.double(), taps.double(), bias.double())
    if has_norm:
        expected = x.double() + convolved
        normed = problems.layer_norm(expected, scale.double(), shift.double())
        product = F.gelu(F.linear(normed, weight.double(), later.double()))
    else:
        expected = F.silu(convolved)
        product = F.linear(expected, weight.double())
    near(y, expected)
    near(out, product)


@pytest.mark.parametrize(
    "tile", [AttentionTile(0, 16, 4, 64), AttentionTile(4, 32, 4, 64), AttentionTile(16, 16, 4, 16)], ids=str
)
@pytest.mark.parametrize("heads", [3, 2])
def test_attention_and_gate(draw: Any, device: torch.device, tile: Any, heads: int) -> None:
    """With 70 tokens in 16 parts there are parts without tokens."""
    channels = 16 * heads
    qk, v, gate = draw(2, 7, 10, 2 * channels), draw(2, 7, 10, channels), draw(2, 7, 10, 2 * channels)[..., channels:]
    taps, bias, rotary = draw(channels, 1, 3, 3), draw(channels), position_tables(7, 10, channels, device)
    found = few_tokens.attend_and_gate(qk, v, gate, taps, bias, *rotary, heads, tile)
    attended = problems.reference_attention(qk.double(), v.double(), rotary, heads)
    near(found, (attended + problems.conv(v.double(), taps.double(), bias.double())) * F.silu(gate.double()))


@pytest.mark.parametrize("table", [{}, {64: Tile(16, 64, 4)}], ids=["two launches", "one launch"])
def test_mlp(device: torch.device, monkeypatch: pytest.MonkeyPatch, table: dict[int, Any]) -> None:
    monkeypatch.setattr(few_tokens, "MLP", table)
    assert problems.largest_error("few_tokens_mlp", device, torch.float32, 48, 16, rows=6, batch=2) < 1e-5


def test_tile_of_the_nearest_width() -> None:
    table = {64: Tile(32, 64, 4), 128: Tile(16, 64, 4)}
    assert [few_tokens.tile_of(table, width) for width in (16, 64, 96, 256)] == [table[w] for w in (64, 64, 128, 128)]


def test_no_dependent_launch_on_a_cpu() -> None:
    assert launch.dependent_launch(torch.device("cpu")) == {"PDL": False}


@pytest.mark.parametrize("most", [2 * 36 * 32**2, 2 * 36 * 32**2 - 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tested", [None, (), ("few_tokens_mixer", "few_tokens_mlp")], ids=str)
@pytest.mark.usefixtures("trusted")
def test_a_prepared_block_takes_them_for_few_tokens(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    dtype: torch.dtype,
    tested: tuple[str, ...] | None,
) -> None:
    """Where a run has tested kernels at set-up, if they were among them; else their first call tests them."""
    if tested is not None:
        monkeypatch.setattr(dispatch, "SET_UP", {torch.zeros(1, device=device).device})
    known = {
        case: ""
        for case in (("few_tokens_mixer", 32, 16, 6), ("few_tokens_mlp", 32, 32, 6))
        if case[0] in (tested or ())
    }
    monkeypatch.setattr(dispatch, "known_verdicts", lambda *_: known)
    calls = []
    for name in ("few_tokens_mixer", "few_tokens_mlp"):
        right = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, name=name, right=right: calls.append(name) or right(*args))
    monkeypatch.setattr(inference, "FEW_PRODUCTS", most)
    torch.manual_seed(0)
    block = use_kernels(MLLABlock(32, 2, qkv_bias=False)).to(device).eval()
    prepared = prepare_for_inference(block, dtype)
    x, rotary = torch.randn(2, 6, 6, 32, device=device), position_tables(6, 6, 32, device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        found = prepared(x, rotary)
        expected = use_kernels(block, "torch")(x, rotary)
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
    is_few = most == 32 * x.numel() and dtype == torch.float16 and tested != ()
    assert calls == (["few_tokens_mixer", "few_tokens_mlp"] if is_few else [])


@pytest.mark.parametrize(
    ("num_tokens", "channels", "heads", "are_few"),
    [(2 * 49, 512, 16, True), (3 * 49, 512, 16, False), (49, 64, 1, False), (49, 768, 24, False)],
)
def test_widths_heads_and_tokens(num_tokens: int, channels: int, heads: int, are_few: bool) -> None:
    assert inference.are_few_tokens(num_tokens, channels, heads) is are_few

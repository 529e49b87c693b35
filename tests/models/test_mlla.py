import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from config import load_config
from models import MLLA, build_model
from models.attention import LinearAttention
from models.layers import Downsample
from models.rope import position_tables, rotary_tables, rotate_pairs
from tests.helpers import GOLDEN, MICRO, fill_weights, random_values

PARAMETERS = {"mlla_tiny": 24_392_200, "mlla_small": 43_015_048, "mlla_base": 95_983_960}


def micro(**changes: object) -> MLLA:
    return MLLA(**{**MICRO, "num_classes": 10, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == PARAMETERS[name]
        config = load_config(f"cfgs/mlla_{name[5]}.yaml")
        assert name == config.MODEL.NAME
        assert sum(p.numel() for p in build_model(config).parameters()) == PARAMETERS[name]


def test_golden_tiny_224() -> None:
    golden = np.load(GOLDEN / "mlla_tiny_224.npz")
    model = timm.create_model("mlla_tiny").eval()
    fill_weights(model)
    with torch.no_grad():
        logits = model(random_values(0, 2, 3, 224, 224))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == golden["n_params"]


def test_golden_micro_64() -> None:
    model = micro().eval()
    fill_weights(model)
    with torch.no_grad():
        logits = model(random_values(0, 2, 3, 64, 64))
    np.testing.assert_allclose(logits, np.load(GOLDEN / "mlla_micro_64.npz")["logits"], atol=1e-4)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_golden_gradients(use_checkpoint: bool) -> None:
    golden = np.load(GOLDEN / "mlla_micro_64_grad.npz")
    model = micro(use_checkpoint=use_checkpoint).train()
    fill_weights(model)
    images = random_values(1, 4, 3, 64, 64).requires_grad_()
    loss = F.cross_entropy(model(images), random_values(101, 4, 10).softmax(1))
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-5)
    assert images.grad is not None
    np.testing.assert_allclose(images.grad, golden["grad_input"], atol=1e-3 * np.abs(golden["grad_input"]).max())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A bias in front of a batch norm has no gradient but rounding noise.
        assert parameter.grad.norm().item() == pytest.approx(golden[f"gradnorm/{name}"].item(), rel=1e-3, abs=1e-6), (
            name
        )


@pytest.mark.parametrize(("height", "width"), [(224, 224), (33, 50), (64, 97), (5, 131), (1, 1)])
def test_any_size(height: int, width: int) -> None:
    model = micro().train()
    logits = model(torch.randn(2, 3, height, width) if height > 1 else torch.randn(9, 3, 1, 1))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_is_zeros_at_right_and_bottom() -> None:
    model = micro().eval()
    images = torch.randn(1, 3, 64, 96)
    images[..., 61:, :] = 0
    images[..., 93:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(images[..., :61, :93]))


def test_odd_grids_are_padded_before_downsampling() -> None:
    """Before, not inside: the first convolution's bias reaches the padding."""
    downsample = Downsample(4).eval()
    nn.init.constant_(downsample.conv[0].conv.bias, 1.0)
    tokens = torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        out = downsample(tokens)
        torch.testing.assert_close(out, downsample(F.pad(tokens, (0, 0, 0, 1, 0, 1))))
    assert out.shape == (2, 2, 3, 8)


def test_no_copies_between_tokens_and_convolutions() -> None:
    """Tokens are contiguous as (B, H, W, C) all the way, and depthwise convolutions see them as channels_last."""
    model = micro().eval()
    seen: list[tuple[Tensor, Tensor]] = []
    for stage in model.stages:
        for block in stage.blocks:
            for conv in (block.cpe1, block.dwc, block.cpe2, block.attn.lepe):
                conv.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(torch.randn(2, 3, 128, 128))
    assert len(seen) == 5 * 4
    assert all(x.is_contiguous() and y.is_contiguous() for x, y in seen)


def quadratic_attention(attention: LinearAttention, v: Tensor) -> Tensor:
    """The definition, token pair by token pair: sum over m of rope(q_n) . rope(k_m) v_m / sum over m of q_n . k_m."""
    batch, height, width, channels = v.shape
    num_heads, num_tokens = attention.num_heads, height * width
    q, k = (F.elu(attention.qk(v)) + 1).chunk(2, dim=-1)
    num_frequencies = channels // 4
    turned = []
    for x in (q, k):
        y = torch.empty_like(x)
        for row in range(height):
            for column in range(width):
                for pair in range(channels // 2):
                    place, j = (row, pair) if pair < num_frequencies else (column, pair - num_frequencies)
                    angle = torch.tensor(place * 10000 ** (-j / num_frequencies))
                    a, b = x[:, row, column, 2 * pair], x[:, row, column, 2 * pair + 1]
                    y[:, row, column, 2 * pair] = a * angle.cos() - b * angle.sin()
                    y[:, row, column, 2 * pair + 1] = a * angle.sin() + b * angle.cos()
        turned.append(y)

    def heads(x: Tensor) -> Tensor:
        return x.reshape(batch, num_tokens, num_heads, -1).transpose(1, 2)

    weights = heads(turned[0]) @ heads(turned[1]).transpose(-2, -1)  # (B, heads, N, N)
    normalizer = (heads(q) @ heads(k).transpose(-2, -1)).sum(dim=-1, keepdim=True)
    out = (weights / normalizer) @ heads(v)
    return out.transpose(1, 2).reshape(v.shape) + attention.lepe(v)


@pytest.mark.parametrize("training", [False, True])
def test_backward_hooks_on_every_module(training: bool) -> None:
    """As tools for attribution and debugging register them; the gradients stay the same."""
    model = MLLA(**MICRO).train(training)
    images = random_values(0, 2, 3, 64, 96)
    gradients: list[list[Tensor]] = []
    calls: set[str] = set()
    for with_hooks in (False, True):
        if with_hooks:
            for name, module in model.named_modules():
                module.register_full_backward_hook(lambda *_, name=name: calls.add(name))
        model.zero_grad()
        inputs = images.clone().requires_grad_()
        model(inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in (*model.parameters(), inputs) if p.grad is not None])
    assert {"", "patch_embed.conv1.norm", "layers.0.downsample.conv.1.conv", "layers.2.blocks.1.mlp"} <= calls
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradients_per_sample_by_torch_func() -> None:
    model = MLLA(**MICRO, num_classes=3).eval()
    images = random_values(0, 3, 3, 64, 96)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def score(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    gradients = vmap(grad(score), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(gradients[name][i], value.grad, rtol=1e-3, atol=1e-4)


def test_ensembles_by_torch_func() -> None:
    models = [MLLA(**MICRO, num_classes=3).eval() for _ in range(2)]
    images = random_values(0, 2, 3, 64, 96)
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    logits = vmap(lambda p, b: functional_call(models[0], (p, b), (images,)))(parameters, buffers)
    for model, row in zip(models, logits, strict=True):
        torch.testing.assert_close(row, model(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_linear_attention_equals_quadratic() -> None:
    attention = LinearAttention(16, num_heads=2).double()
    v = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    gate = torch.randn_like(v)
    fast = attention(v, gate, position_tables(3, 5, 16, v.device))
    torch.testing.assert_close(fast, quadratic_attention(attention, v) * F.silu(gate), atol=1e-5, rtol=1e-4)


def test_rotary_by_hand() -> None:
    cos, sin = rotary_tables(3, 4, 8, torch.device("cpu"))
    assert cos.shape == sin.shape == (3, 4, 4)
    # Two frequencies, 1 and 10000^(-1/2) = 0.01; token (2, 3): rows first, then columns.
    angles = torch.tensor([2.0, 0.02, 3.0, 0.03])
    torch.testing.assert_close(cos[2, 3], angles.cos())
    torch.testing.assert_close(sin[2, 3], angles.sin())
    quarter_turn = rotate_pairs(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(2), torch.ones(2))
    assert quarter_turn.tolist() == [-2.0, 1.0, -4.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(dtype: torch.dtype) -> None:
    model = micro().eval()
    fill_weights(model)
    images = random_values(5, 2, 3, 64, 64)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", dtype=dtype):
            rough = model(images).float()
    assert (rough - exact).norm() / exact.norm() < (0.05 if dtype is torch.bfloat16 else 0.01)


def test_float16_sums_do_not_overflow_on_large_grids() -> None:
    attention = LinearAttention(32, num_heads=1)
    v = 8 + torch.randn(1, 300, 300, 32)  # the plain sum of k v over 90,000 tokens is beyond 65,504
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        out = attention.attend(v.half(), position_tables(300, 300, 32, v.device))
    assert torch.isfinite(out).all()


def test_small_queries_and_keys_are_not_rounded_to_zero_in_sixteen_bits() -> None:
    """ELU + 1 of -7 is 0.0009, and bfloat16 has nothing between 1 and 1 - 1/256. One token attends to itself alone."""
    attention = LinearAttention(32, num_heads=1)
    nn.init.zeros_(attention.qk.weight)
    nn.init.constant_(attention.qk.bias, -7.0)
    nn.init.zeros_(attention.lepe.weight)
    nn.init.zeros_(attention.lepe.bias)
    v = torch.ones(1, 1, 1, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention.attend(v, position_tables(1, 1, 32, v.device))
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


def test_state_dict_names() -> None:
    names = set(micro(ape=True).state_dict())
    block = "layers.2.blocks.1"
    expected = {"absolute_pos_embed", "head.weight", "norm.bias", "patch_embed.conv2.1.norm.running_var"}
    expected |= {f"{block}.{part}.weight" for part in ("cpe1", "norm1", "in_proj", "act_proj", "dwc", "attn.qk")}
    expected |= {f"{block}.{part}.bias" for part in ("attn.lepe", "out_proj", "cpe2", "norm2", "mlp.fc1", "mlp.fc2")}
    expected |= {"layers.0.downsample.conv.1.conv.weight", "layers.0.downsample.conv.2.norm.weight"}
    assert expected <= names
    assert not any("rope" in name or "rotations" in name for name in names)


def test_official_rotary_tables_are_read_and_ignored() -> None:
    model = micro()
    weights = dict(model.state_dict())
    weights["layers.0.blocks.0.attn.rope.rotations"] = torch.zeros(16, 16, 16, 2)
    model.load_state_dict(weights, strict=True)
    assert "layers.0.blocks.0.attn.rope.rotations" in weights  # the caller's dictionary is as it was


def test_initialization() -> None:
    torch.manual_seed(0)
    model = micro(ape=True)
    assert model.layers[3].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.layers[3].blocks[0].mlp.fc1.bias.abs().max() == 0
    assert model.absolute_pos_embed is not None
    assert model.absolute_pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


def test_drop_path_rises_linearly() -> None:
    model = micro(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_position_embedding_at_other_sizes() -> None:
    model = micro(ape=True).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 72)).shape == (1, 10)
        assert model.position_table(16, 16).flatten(1, 2).equal(model.absolute_pos_embed)


def test_gradient_checkpointing_saves_memory_and_can_be_switched() -> None:
    model = micro().train()
    images = torch.randn(2, 3, 64, 64)

    def saved_bytes() -> int:
        total = 0

        def count(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(images)
        return total

    plain = saved_bytes()
    model.set_grad_checkpointing()
    assert saved_bytes() < plain / 2
    model.set_grad_checkpointing(False)
    assert saved_bytes() == plain


def test_a_frozen_backbone_stays_in_evaluation_mode() -> None:
    model = micro(drop_path_rate=0.5, drop_rate=0.5, use_checkpoint=True)
    model.freeze_backbone()
    model.train()
    assert model.training
    assert model.head.training
    assert not any(
        module.training for child in model.children() if child is not model.head for module in child.modules()
    )
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    images = random_values(0, 2, 3, 64, 64)
    assert model(images).equal(model.eval()(images))  # nothing is dropped
    assert not model.forward_features(images).requires_grad  # and nothing is kept for a backward pass
    model.eval()
    assert not model.head.training
    model.reset_classifier(3)
    assert model.train()(images).requires_grad
    with pytest.raises(ValueError, match="only a model with one classifier"):
        micro(num_classes=0).freeze_backbone()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": (1, 2, 3, 8)}, "stage 2 is 128 wide"),
        ({"embed_dim": 6, "num_heads": (1, 2, 3, 4)}, "and so must 4"),
        ({"patch_size": 8}, "patch_size is 4"),
        ({"depths": (1, 2)}, "differ in length"),
    ],
)
def test_wrong_sizes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**changes)


def test_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="window_size"):
        micro(window_size=7)
    with pytest.raises(TypeError, match="window_size"):
        timm.create_model("mlla_tiny", window_size=7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_agrees_with_cpu(dtype: torch.dtype) -> None:
    model = micro().eval()
    fill_weights(model)
    images = random_values(5, 2, 3, 97, 64)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
            out = model.cuda()(images.cuda()).float().cpu()
    bound = {torch.float32: 2e-3, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]  # float32 convolutions use TF32
    assert (out - exact).norm() / exact.norm() < bound

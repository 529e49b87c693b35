"""LinearViT: parameters and MACs of the paper's rows, structure, any image size, 16 bits, training."""

import itertools
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from config import load_config
from models import ABLATIONS, PAPER_PROFILES, LinearViT, Switches, build_model
from models.mlla import MLLABlock
from models.rope import position_tables, rotary_tables
from models.unified.block import Gate, UnifiedAttention, UnifiedBlock
from models.unified.linear_vit import PatchMerging
from tests.helpers import fill_weights, random_values
from utils.checkpoint.weights import load_pretrained
from utils.speed.flops import profile
from utils.training.optimizer import parameter_groups

# Parameters in millions and GMACs, calculated by hand from the widths.
COUNTS = {
    "baseline": (28.27, 4.44),
    "input_gate": (28.54, 4.49),
    "forget_gate": (28.68, 4.81),
    "shortcut": (28.27, 4.44),
    "no_norm": (28.27, 4.44),
    "single_head": (24.23, 3.84),
    "block_all": (32.66, 5.25),
    "block_sub": (30.47, 4.80),
    "ape": (29.70, 4.44),
    "lepe": (28.31, 4.45),
    "cpe": (28.35, 4.47),
    "rope": (28.27, 4.44),
    "mamba_like": (17.33, 3.48),
    "mlla_like": (30.60, 4.84),
}
MAMBA = Switches(True, True, True, False, True, "all")
MLLA_LIKE = Switches(block="sub", lepe=True, cpe=True, rope=True)
EVERYTHING = Switches(True, True, True, False, True, "sub", True, True, True, True)


def small(switches: Switches | None = None, **changes: object) -> LinearViT:
    sizes = {"img_size": 32, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 5}
    return LinearViT(**{**sizes, "drop_path_rate": 0.0, "switches": switches, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_macs(name: str) -> None:
    config = load_config(f"cfgs/ablation/{name}.yaml")
    with torch.device("meta"):
        model = build_model(config)
    total = profile(model, 224)[-1]
    assert (total.parameters / 1e6, total.macs / 1e9) == pytest.approx(COUNTS[name], abs=0.006)
    if name in {row.name for row in ABLATIONS} - {"block_all"}:  # the paper leaves it open, see cfgs/ablation
        paper = PAPER_PROFILES[config.MODEL.NAME]
        assert total.parameters / 1e6 == pytest.approx(paper.parameters_m, rel=0.03)
        assert total.macs / 1e9 == pytest.approx(paper.gmacs, rel=0.03)


def test_every_row_has_a_configuration_that_changes_one_key() -> None:
    names = {path.stem for path in Path("cfgs/ablation").glob("*.yaml")}
    assert names == {row.name for row in ABLATIONS} | {"base", "digits", "fashion_mnist", "mamba_like", "mlla_like"}
    baseline = load_config("cfgs/ablation/baseline.yaml").MODEL.LINEAR_VIT
    for row in ABLATIONS[1:]:
        config = load_config(f"cfgs/ablation/{row.name}.yaml")
        assert row.model == config.MODEL.NAME
        assert len([key for key in baseline if config.MODEL.LINEAR_VIT[key] != baseline[key]]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("value", [False, True])
def test_pairs_of_switches_train(value: bool) -> None:
    """Two switches on, or two off, on an image of another size than img_size."""
    names = [field.name for field in fields(Switches) if field.name != "block"]
    choices = [dict.fromkeys(pair, value) for pair in itertools.combinations(names, 2)]
    for i, chosen in enumerate(choices):
        block = ("transformer", "sub", "all")[i % 3]
        model = small(Switches(**{**dict.fromkeys(names, not value), **chosen}, block=block))
        logits = model(torch.randn(2, 3, 37, 22))
        logits.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), chosen


@torch.no_grad()
def test_mlla_like_block_equals_mlla_block() -> None:
    """Block design, LePE, CPE and RoPE give the same state_dict and outputs as MLLA's own block."""
    ours = UnifiedBlock(16, 2, (5, 7), MLLA_LIKE).double().eval()
    theirs = MLLABlock(16, 2).double().eval()
    fill_weights(theirs)
    ours.load_state_dict(theirs.state_dict())
    tokens = random_values(0, 2, 5, 7, 16).double()
    rotary = rotary_tables(5, 7, 16, tokens.device)
    torch.testing.assert_close(
        ours(tokens, rotary), theirs(tokens, position_tables(5, 7, 16, tokens.device)), rtol=1e-5, atol=1e-6
    )


def test_structure_of_the_mamba_block() -> None:
    """Twice the width, no MLP, one head, and a decay for each state row and channel."""
    block = UnifiedBlock(32, 4, (4, 4), MAMBA)
    names = {name.split(".")[0] for name, _ in block.named_children()}
    assert names == {"ape", "norm1", "in_proj", "act_proj", "dwc", "attn", "out_proj", "drop_path"}
    assert block.in_proj.out_features == block.act_proj.out_features == 64
    assert block.attn.qk.out_features == 2 * 8
    assert block.attn.A_log.shape == (8, 64)
    assert block.attn.D.shape == (64,)
    torch.testing.assert_close(block.attn.decay_rates()[0, :, 5], -torch.arange(1.0, 9.0))


def test_initial_delta() -> None:
    torch.manual_seed(0)
    for switches, low, high in ((Switches(input_gate=True), 0.9, 1.1), (Switches(forget_gate=True), 8e-4, 0.12)):
        gates = [module for module in small(switches).modules() if isinstance(module, Gate)]
        delta = torch.stack([gate(torch.randn(50, gate.down.in_features)).mean() for gate in gates])
        assert len(gates) == 3
        assert ((delta > low) & (delta < high)).all()


def test_only_a_forget_gate_makes_attention_causal() -> None:
    """Changing a token changes itself and later tokens in raster order; without a forget gate earlier ones too."""
    for switches, changes_earlier in ((Switches(forget_gate=True), False), (Switches(input_gate=True), True)):
        attention = UnifiedAttention(16, 2, 8, switches)
        x = torch.randn(1, 3, 4, 16)
        changed = x.clone()
        changed[:, 1, 2] += 1.0
        difference = (attention(x, x) - attention(changed, changed)).abs().sum(dim=-1).flatten()
        assert (difference[7:] > 0).all()
        assert (difference[:6] > 1e-7).any() == changes_earlier


def test_patch_merging_zero_pads_at_right_and_bottom() -> None:
    merging = PatchMerging(4)
    tokens = torch.randn(2, 3, 5, 4)
    out = merging(tokens)
    torch.testing.assert_close(out, merging(F.pad(tokens, (0, 0, 0, 1, 0, 1))))
    assert out.shape == (2, 2, 3, 8)
    neighbors = merging.norm(torch.cat([tokens[0, y, x] for x in (2, 3) for y in (0, 1)]))  # Swin's order
    torch.testing.assert_close(out[0, 0, 1], merging.reduction(neighbors))


def test_parameters_without_weight_decay() -> None:
    model = small(Switches(forget_gate=True, shortcut=True, ape=True))
    decayed, exempt = (set(map(id, group["params"])) for group in parameter_groups(model, 0.05))
    for name, parameter in model.named_parameters():
        is_exempt = parameter.ndim < 2 or name.endswith(("bias", "absolute_pos_embed", "A_log"))
        assert id(parameter) in (exempt if is_exempt else decayed), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [-1e4, 1e4, 6e4])
def test_extreme_gates_in_16_bits_stay_finite(dtype: torch.dtype, bias: float) -> None:
    """Gates closed or open to the limits of the number format, forward and backward."""
    for switches in (Switches(input_gate=True), Switches(forget_gate=True), EVERYTHING):
        model = small(switches)
        for module in model.modules():
            if isinstance(module, Gate):
                torch.nn.init.constant_(module.up.bias, bias)
                torch.nn.init.normal_(module.down.weight, std=10.0)
                torch.nn.init.normal_(module.up.weight, std=1e4)
        with torch.autocast("cpu", dtype=dtype):
            logits = model(10 * torch.randn(2, 3, 32, 32))
        assert torch.isfinite(logits).all()
        (logits.float().sum() * 1e-3).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("switches", [Switches(forget_gate=True), EVERYTHING])
def test_activation_checkpointing_gives_the_same_gradients(switches: Switches) -> None:
    model = small(switches)
    images = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_position_embeddings_are_resized_when_loaded(tmp_path: Path) -> None:
    """Fine-tuning at another image size than the weights were trained at."""
    trained, larger = small(Switches(ape=True)), small(Switches(ape=True), img_size=64)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    load_pretrained(larger, str(tmp_path / "trained.pth"))
    assert larger.layers[1].blocks[1].ape.absolute_pos_embed.shape == (1, 64, 16)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(larger.eval()(images), trained.eval()(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("switches", [EVERYTHING, MAMBA])
def test_frozen_backbone_and_layer_decay(switches: Switches) -> None:
    model = small(switches)
    rates = {}
    for group in parameter_groups(model, 0.05, layer_decay=0.5):
        rates |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    by_name = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["head.weight"] == 1
    assert by_name["layers.1.blocks.1.out_proj.weight"] == by_name["norm.weight"] == 0.5
    assert by_name["patch_embed.proj.weight"] == 0.5**4
    model.freeze_backbone()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert not model.train().layers.training
    assert model.head.training


def test_timm_interface() -> None:
    model = small()
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, model.num_features)
    assert model.forward_head(model.forward_features(torch.randn(1, 3, 64, 32)), pre_logits=True).shape == (1, 16)


@pytest.mark.parametrize(
    ("switches", "changes", "message"),
    [
        (None, {"depths": (1,)}, "differ in length"),
        (None, {"num_heads": (1, 3)}, "stage 1 is 16 wide, which 3 heads do not divide"),
        (Switches(rope=True, single_head=True), {"num_heads": (4, 8)}, "q is 2 wide; rotary embedding"),
    ],
)
def test_sizes_that_do_not_fit_raise(switches: Switches | None, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(switches, **changes)


def test_unknown_block_raises() -> None:
    with pytest.raises(ValueError, match="must be one of transformer, sub, all"):
        Switches(block="mamba")


@pytest.mark.slow
def test_main_trains_resumes_evaluates_and_measures(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """AMP, EMA, MESA, activation checkpointing, --resume of the next epoch, --eval, --throughput, --profile."""
    config = tmp_path / "gated.yaml"
    config.write_text(
        f"BASE: ['{Path('cfgs/ablation/digits.yaml').resolve()}']\n"
        "DATA: {IMG_SIZE: 24, BATCH_SIZE: 256}\nEMA: {ENABLED: True, DECAY: 0.1}\nAUG: {MESA: 1.0}\n"
        "MODEL:\n  NAME: gated\n  LINEAR_VIT: {DEPTHS: [1, 1], NUM_HEADS: [1, 2], FORGET_GATE: True, ROPE: True}\n"
        "TRAIN: {WARMUP_EPOCHS: 0}\nSAVE_FREQ: 1\n"
    )
    args = ["--cfg", config, "--output", tmp_path, "--amp"]
    folder = tmp_path / "gated/default"
    for epochs in (1, 2):  # the second call resumes
        assert run_main(*args, "--use-checkpoint", "--opts", "TRAIN.EPOCHS", epochs)[0] == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    code, out, _ = run_main(*args, "--eval", "--resume", folder / "max_acc.pth", "--opts", "AMP_DTYPE", "bfloat16")
    assert code == 0
    assert f"Acc@1 {max(record['acc1'] for record in records):.3f}" in out
    code, out, _ = run_main("--cfg", config, "--output", tmp_path, "--throughput", "--batch-size", "2")
    assert code == 0
    assert "gated" in out
    code, out, _ = run_main("--cfg", "cfgs/ablation/forget_gate.yaml", "--profile")
    assert code == 0
    assert out.splitlines()[-1].split() == ["paper", "29", "M", "4.8"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_agrees_with_cpu(dtype: torch.dtype) -> None:
    model = small(EVERYTHING).eval()
    images = random_values(5, 2, 3, 97, 64)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
            out = model.cuda()(images.cuda()).float().cpu()
    bound = {torch.float32: 2e-3, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (out - exact).norm() / exact.norm() < bound

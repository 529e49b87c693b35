"""Maps of what models read and see, against their definitions; and the command that draws them."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from downstream.build import build_backbone
from downstream.detection import config as detection
from models import MLLA, LinearViT, Switches
from models.inspection import attention_inputs, attention_map, gate_values, receptive_fields
from models.rope import rotary_tables
from tests.helpers import MICRO, deep_gray, exit_code
from utils import visualize

SIZES = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 10}


def linear_vit(switches: Switches) -> LinearViT:
    torch.manual_seed(0)
    return LinearViT(**SIZES, switches=switches).eval()  # type: ignore[arg-type]


def sharpen(model: nn.Module) -> None:
    """Fresh projections are so small that all tokens look the same."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)


@torch.no_grad()
def test_mllas_map_times_the_values_is_its_output() -> None:
    model = MLLA(**MICRO, num_classes=10).eval()
    sharpen(model)
    seen = attention_inputs(model, torch.randn(2, 3, 64, 32))[1]
    assert seen.name == "stage 2, block 1"
    assert seen.rotary is not None
    _, height, width, channels = seen.x.shape
    layer = seen.layer
    expected = layer.attend(seen.x, seen.rotary)
    values = seen.x.unflatten(-1, (layer.num_heads, -1))  # (B, H, W, heads, e)
    for query in ((0, 0), (height - 1, width - 2)):
        weights = attention_map(seen, query)  # (B, heads, H, W)
        out = torch.einsum("bghw,bhwge->bge", weights, values).reshape(-1, channels)
        torch.testing.assert_close(out, expected[:, query[0], query[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "switches",
    [
        Switches(),
        Switches(input_gate=True, lepe=True, shortcut=True),
        Switches(forget_gate=True, rope=True),
        Switches(True, True, True, False, True, "all"),
    ],
)
def test_what_one_token_says_is_read_with_the_maps_weight(switches: Switches) -> None:
    model = linear_vit(switches)
    sharpen(model)
    seen = attention_inputs(model, torch.randn(1, 3, 32, 32))[0]
    weights = attention_map(seen, (3, 5))  # (1, heads, H, W)
    for place in ((0, 0), (3, 4), (3, 5), (7, 7)):
        v = torch.zeros_like(seen.x)
        v[:, place[0], place[1]] = 1.0
        read = seen.layer.attend(seen.x, v, seen.rotary)[0, 3, 5].unflatten(0, (seen.layer.num_heads, -1)).mean(dim=1)
        torch.testing.assert_close(weights[0, :, place[0], place[1]], read, rtol=1e-4, atol=1e-6)


def test_maps_of_a_normalized_layer_sum_to_one() -> None:
    model = linear_vit(Switches(rope=True))
    seen = attention_inputs(model, torch.randn(1, 3, 32, 32))[0]
    plain = attention_map(seen, (2, 2), rotate=False)
    torch.testing.assert_close(plain.sum(dim=(2, 3)), torch.ones(1, 2), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, attention_map(seen, (2, 2)))
    identity = rotary_tables(1, 1, 8, torch.device("cpu"))  # at row and column 0 nothing turns
    torch.testing.assert_close(plain, attention_map(seen._replace(rotary=identity), (2, 2)))


def test_gates_by_hand() -> None:
    model = linear_vit(Switches(input_gate=True, forget_gate=True))
    for module in model.modules():
        if hasattr(module, "A_log"):
            nn.init.zeros_(module.gate.up.weight)
            nn.init.constant_(module.gate.up.bias, 0.5413249)  # softplus of this is 1
            nn.init.constant_(module.A_log, 0.6931472)  # A = -2
    gates = gate_values(model, torch.randn(3, 3, 32, 32))
    assert [gate.name for gate in gates] == ["stage 1, block 1", "stage 2, block 1"]
    torch.testing.assert_close(gates[0].delta, torch.ones(3, 8, 8))
    assert gates[1].forget is not None
    torch.testing.assert_close(gates[1].forget, torch.full((3,), 0.1353353))  # e^-2
    assert gate_values(linear_vit(Switches()), torch.randn(1, 3, 32, 32)) == []


def test_receptive_fields() -> None:
    """A convolution sees its own patch; a causal scan what comes before; linear attention everything."""
    images = torch.randn(1, 3, 32, 32)
    causal = receptive_fields(linear_vit(Switches(forget_gate=True)), images)[0][0]
    everything = receptive_fields(linear_vit(Switches()), images)[0][0]
    assert causal.shape == everything.shape == (32, 32)
    assert causal.max() == everything.max() == 1
    assert (causal[20:] == 0).all()  # the middle token is at row 4 of 8: pixels 16 to 19
    assert (causal[:12] > 0).any()
    assert (everything > 0).float().mean() > 0.99
    assert len(receptive_fields(MLLA(**MICRO, num_classes=10).eval(), images)) == 4


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as main.py writes it, with its configuration."""
    config = tmp_path / "model.yaml"
    config.write_text(
        "MODEL:\n  TYPE: linear_vit\n  NAME: gated\n  LINEAR_VIT:\n    EMBED_DIM: 8\n    DEPTHS: [1, 1]\n"
        "    NUM_HEADS: [2, 2]\n    FORGET_GATE: True\n    ROPE: True\nDATA:\n  DATASET: digits\n  IMG_SIZE: 32\n"
    )
    model = linear_vit(Switches(forget_gate=True, rope=True))
    torch.save({"model": model.state_dict(), "config": config.read_text()}, tmp_path / "gated.pth")
    return tmp_path / "gated.pth"


@pytest.mark.slow
def test_pictures(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mlla"), "handlers", [])  # of commands that other tests have run
    images = []
    for i, size in enumerate([(50, 90), (64, 40)]):
        Image.new("RGB", size, (200, 30 * i, 5)).save(tmp_path / f"{i}.png")
        images.append(str(tmp_path / f"{i}.png"))
    words = ["--resume", str(checkpoint), "--output", str(tmp_path / "out"), "--size", "40"]
    assert visualize.main([*words, "--images", *images]) == 0
    names = {"delta.png", "forget_gate.png", "receptive_field.png", "attention.png", "attention_without_rope.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert set(map(Path, capsys.readouterr().out.split())) == {tmp_path / "out" / name for name in names}
    assert all(Image.open(tmp_path / "out" / name).width > 400 for name in names)


@pytest.mark.slow
def test_images_of_the_models_own_dataset(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", checkpoint, "--output", tmp_path / "out", "--opts", "DATA.DATASET", "folder"]
    assert exit_code(visualize.main, words) == 2
    assert "--data-path; or name images with --images FILE ... or --photographs" in capsys.readouterr().err
    assert exit_code(visualize.main, [*words, "--data-path", image_folder]) == 0
    assert exit_code(visualize.main, [*words, "--data-path", image_folder]) == 2
    assert "delta.png: already exists; name another --output, or replace it with --force" in capsys.readouterr().err


@pytest.mark.slow
def test_the_backbone_of_a_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opts = ["MODEL.MLLA.EMBED_DIM", "8", "MODEL.MLLA.DEPTHS", "[1,1,1,1]", "MODEL.MLLA.NUM_HEADS", "[1,1,1,1]"]
    config = detection.load_config("shapes", opts)
    weights = {f"backbone.{name}": value for name, value in build_backbone(config).state_dict().items()}
    trained = detection.load_config("shapes", [*opts, "MODEL.KERNELS", "triton"])  # as on a GPU
    torch.save({"model": weights, "config": trained.dump()}, tmp_path / "d.pth")
    words = ["--weights", tmp_path / "d.pth", "--size", "32", "--output", tmp_path / "out"]
    assert exit_code(visualize.main, words) == 2
    assert "d.pth: is for detection; name images with --images" in capsys.readouterr().err
    assert exit_code(visualize.main, [*words, "--digits", "1"]) == 0
    assert (tmp_path / "out" / "attention.png").is_file()


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    deep_gray().save(tmp_path / "deep.png")
    options = visualize.parse(["--resume", "x", "--images", str(tmp_path / "deep.png")])
    (image,) = visualize.open_images(options, 32)
    assert np.asarray(image).mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "missing.pth"], "missing.pth: no such checkpoint file"),
        (["--resume", "{bare}"], "holds no configuration; name its YAML file with --cfg"),
        (["--resume", "{bare}", "--cfg", "cfgs/mlla_t.yaml"], "does not fit the model"),
        (["--resume", "{good}", "--images", "missing.jpg"], "missing.jpg"),
        (["--resume", "{good}", "--images", "LICENSE"], "LICENSE: not an image, or of an unknown format"),
    ],
)
def test_mistakes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    torch.save(torch.load(checkpoint)["model"], tmp_path / "bare.pth")
    filled = [word.format(bare=tmp_path / "bare.pth", good=checkpoint) for word in words]
    with pytest.raises(SystemExit) as stop:
        visualize.main([*filled, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_query_outside_the_image(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        visualize.main(["--resume", "x", "--query", "2", "0"])
    assert "must be from 0 (top, left) to 1 (bottom, right)" in capsys.readouterr().err

"""Exported files compute what the model computes; what cannot be exported is reported in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from config import load_config
from downstream.backbone import MLLABackbone, TimmBackbone
from downstream.detection import config as detection
from models import build_model
from tests.faults.tasks import SMALL_BACKBONE
from tests.helpers import ROOT, exit_code, fill_weights, random_values
from utils import export
from utils.checkpoint.weights_file import load_checkpoint
from utils.tools import export_formats
from utils.tools.onnx_export import OLDEST_TORCH, check_standard, has_exporter, onnx_runner, write_reduced

CFG = str(ROOT / "cfgs" / "digits.yaml")
# Two stages, since exporting takes long; a detector has four.
OPTS = ["MODEL.MLLA.EMBED_DIM", "32", "MODEL.MLLA.DEPTHS", "[1,1]", "MODEL.MLLA.NUM_HEADS", "[1,1]"]
CLASSES = list("abcdefghij")
LINEAR_VIT = ["--to", "torchscript", "--opts", "MODEL.TYPE", "linear_vit"]
SHAPES = {task: str(ROOT / "downstream" / task / "cfgs" / "shapes.yaml") for task in ("detection", "segmentation")}

NEEDS_EXPORTER = pytest.mark.skipif(not has_exporter(), reason=f"ONNX needs torch {OLDEST_TORCH}")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = build_model(load_config(CFG, OPTS), 10).eval()
    fill_weights(model)
    return model


@pytest.fixture(scope="module")
def weights(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save({"model": other, "state_dict_ema": model.state_dict(), "classes": CLASSES}, path)
    return path


def run(target: Path, weights: Path, form: str, *args: str) -> int:
    args = ("--cfg", CFG, "--resume", str(weights), "--to", form, *args, "--opts", *OPTS)
    return exit_code(export.main, [target, *args])


def test_onnx_with_an_old_torch_is_refused(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    assert run(tmp_path / "m.onnx", weights, "onnx") == 2
    assert f"--to onnx needs torch {OLDEST_TORCH} or later; this is 2.7.1+cu126" in capsys.readouterr().err


@pytest.mark.slow
@NEEDS_EXPORTER
def test_onnx_of_a_fixed_size(
    tmp_path: Path, weights: Path, model: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    target = tmp_path / "m.onnx"
    assert run(target, weights, "onnx", "--size", "32", "--evaluate") == 0
    out = capsys.readouterr().out
    assert "classifier in onnx, float32" in out
    assert out.count(" on 360 images") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]  # with the weights inside
    graph = onnx.load(str(target))
    check_standard(graph)
    metadata = {item.key: json.loads(item.value) for item in graph.metadata_props}
    assert metadata["classes"] == CLASSES
    assert graph.opset_import[0].version >= 18
    images = random_values(1, 5, 3, 32, 32)
    torch.testing.assert_close(onnx_runner(target)(images)[0], model(images), atol=1e-4, rtol=1e-4)
    for precision, bound in (("float16", 0.01), ("int8", 0.1)):
        write_reduced(target, smaller := tmp_path / "s.onnx", precision)
        error = (onnx_runner(smaller)(images)[0] - model(images)).abs().max() / model(images).abs().max()
        assert 0 < error < bound
        assert smaller.stat().st_size < 0.9 * target.stat().st_size


@pytest.mark.slow
def test_default_size_is_img_size(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "m.pt", weights, "torchscript", "--evaluate") == 0
    assert capsys.readouterr().out.count(" on 360 images") == 2
    assert run(tmp_path / "n.pt", weights, "torchscript", "--evaluate", "--size", "64") == 2
    assert "--size 64: --evaluate scores images of DATA.IMG_SIZE 32; leave out --size" in capsys.readouterr().err
    assert not (tmp_path / "n.pt").exists()


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MLLABackbone]:
    """A detector's file as OpenMMLab writes it, and its backbone, with the sizes in SMALL_BACKBONE."""
    backbone = MLLABackbone(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).eval()
    fill_weights(backbone)
    path = tmp_path_factory.mktemp("detector") / "d.pth"
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": {**weights, "neck.fpn_convs.0.conv.bias": torch.zeros(3)}, "meta": {}}, path)
    return path, backbone


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "name", "args", "sizes"),
    [
        pytest.param(
            *("detection", "m.onnx", ["--to", "onnx", "--size", "dynamic"], [(64, 96), (160, 128)]),
            marks=NEEDS_EXPORTER,
        ),
        ("segmentation", "m.pt", ["--to", "torchscript", "--size", "50x72"], [(50, 72)]),
    ],
)
def test_backbone_of_a_detector_or_segmentor(
    tmp_path: Path, detector: Any, task: str, name: str, args: list[str], sizes: list[tuple[int, int]]
) -> None:
    pytest.importorskip("onnx")
    source, backbone = detector
    target = tmp_path / name
    args += ["--cfg", SHAPES[task], "--resume", str(source), "--part", "backbone", "--opts", *SMALL_BACKBONE]
    assert export.main([str(target), *args]) == 0
    for size in sizes:
        images = random_values(2, 2, 3, *size)
        outputs = onnx_runner(target)(images) if name == "m.onnx" else torch.jit.load(target)(images)
        for one, other in zip(outputs, backbone(images), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_safetensors_of_a_backbone(tmp_path: Path, detector: Any) -> None:
    source, backbone = detector
    target = tmp_path / "b.safetensors"
    args = ["--cfg", SHAPES["detection"], "--resume", str(source), "--part", "backbone", "--opts", *SMALL_BACKBONE]
    assert export.main([str(target), "--to", "safetensors", *args]) == 0
    saved = safetensors.torch.load_file(target)
    assert set(saved) == set(backbone.state_dict())
    assert all(saved[name].equal(value) for name, value in backbone.state_dict().items())


@pytest.mark.slow
def test_timm_backbone(tmp_path: Path) -> None:
    backbone = TimmBackbone("test_convnext")
    torch.save({f"backbone.{name}": value for name, value in backbone.state_dict().items()}, tmp_path / "d.pth")
    args = ["--resume", str(tmp_path / "d.pth"), "--to", "exported_program", "--part", "backbone", "--size", "64"]
    target = tmp_path / "m.pt2"
    assert (
        export.main([str(target), "--cfg", SHAPES["detection"], *args, "--opts", "MODEL.TYPE", "timm:test_convnext"])
        == 0
    )
    images = random_values(2, 2, 3, 64, 64)
    for output, expected in zip(torch.export.load(target).module()(images), backbone.eval()(images), strict=True):
        torch.testing.assert_close(output, expected)


@pytest.mark.slow
def test_maps_of_any_size(tmp_path: Path, weights: Path, model: Any) -> None:
    target = tmp_path / "m.pt2"
    assert run(target, weights, "exported_program", "--size", "dynamic", "--part", "maps") == 0
    program = torch.export.load(target).module()
    for shape in ((1, 3, 64, 64), (4, 3, 96, 224), (2, 3, 224, 64)):
        images = random_values(1, *shape)
        maps = model.forward_intermediates(images, intermediates_only=True)
        for output, expected in zip(program(images), maps, strict=True):
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    # Not a multiple of 8; the second message is from torch before 2.9, which takes multiples of 32.
    with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|to be of the form (8|32)"):
        program(random_values(1, 1, 3, 84, 96))


def test_custom_operators_and_complex_numbers_are_refused() -> None:
    helper = pytest.importorskip("onnx").helper
    for domain, kind in (("com.microsoft", "FLOAT"), ("", "COMPLEX64")):
        values = [helper.make_tensor_value_info(name, getattr(helper.TensorProto, kind), [1]) for name in "xy"]
        node = helper.make_node("Relu", ["x"], ["y"], domain=domain)
        with pytest.raises(ValueError, match="not standard ONNX"):
            check_standard(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name", "args"),
    [
        ("torchscript", "m.pt", ["--size", "32x64", "--part", "features"]),
        ("safetensors", "m.safetensors", []),
    ],
)
def test_other_formats(tmp_path: Path, weights: Path, model: Any, form: str, name: str, args: list[str]) -> None:
    target = tmp_path / name
    assert run(target, weights, form, *args) == 0
    if form == "safetensors":
        with safetensors.safe_open(target, "pt") as file:
            assert set(file.keys()) == set(model.state_dict())
            assert file.get_tensor("head.bias").equal(model.head.bias)
        content = load_checkpoint(target)  # predict needs no other file
        assert content["classes"] == CLASSES
        assert load_config(content["config"]).MODEL.MLLA.DEPTHS == [1, 1]
        return
    images = random_values(1, 4, 3, 32, 64)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(torch.jit.load(target)(images), expected)


def test_the_configuration_is_in_the_weights_file(
    tmp_path: Path, model: nn.Module, detector: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(CFG, [*OPTS, "DATA.DATASET", "folder", "DATA.DATA_PATH", str(tmp_path / "gone")])
    torch.save({"model": model.state_dict(), "config": config.dump()}, tmp_path / "w.pth")
    args = ["--weights", tmp_path / "w.pth", "--to", "safetensors", "--size", "32"]
    assert exit_code(export.main, [tmp_path / "w.safetensors", *args]) == 0
    assert "classifier in safetensors" in capsys.readouterr().out
    source, _ = detector  # for which only the backbone is of use
    content = torch.load(source)
    torch.save({**content, "config": detection.load_config("shapes", SMALL_BACKBONE).dump()}, tmp_path / "d.pth")
    args[1] = tmp_path / "d.pth"
    assert exit_code(export.main, [tmp_path / "d.safetensors", *args]) == 0
    assert "backbone in safetensors" in capsys.readouterr().out
    assert exit_code(export.main, [tmp_path / "e.safetensors", *args, "--part", "maps"]) == 2
    assert "d.pth is for detection; its --part backbone can be exported" in capsys.readouterr().err
    args[1:] = [tmp_path / "w.pth", "--to", "safetensors", "--evaluate"]
    monkeypatch.setattr(export, "build_part", None)  # without images nothing is built
    assert exit_code(export.main, [tmp_path / "f.safetensors", *args]) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_file_that_differs_from_the_model_is_not_kept(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(form: str, path: Path, model: nn.Module) -> export.Runner:  # noqa: ARG001
        return lambda images: [model(images) * 1.001]

    monkeypatch.setattr(export, "open_runner", wrong)
    assert run(tmp_path / "m.safetensors", weights, "safetensors", "--size", "32") == 2
    assert "differs from PyTorch by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("m.onnx", ["--to", "torchscript"], "must end in .pt"),
        ("m.pt", ["--to", "torchscript", "--size", "dynamic"], "a TorchScript trace has a fixed size"),
        ("m.pt", ["--to", "torchscript", "--precision", "int8"], "--precision int8 works with --to onnx"),
        ("m.pt", ["--to", "torchscript", "--size", "4x"], "--size 4x: write a side in pixels"),
        ("m.pt", ["--to", "torchscript", "--part", "maps", "--evaluate"], "--evaluate works with --part classifier"),
        ("no/m.pt", ["--to", "torchscript"], "there is no folder"),
        ("there.pt", ["--to", "torchscript"], "already exists; name another file"),
        ("m.pt", ["--to", "torchscript", "--resume", "none.pth"], "no such checkpoint file"),
        ("m.pt", ["--to", "torchscript", "--part", "backbone"], "w.pth: has no backbone with a norm per feature map"),
        ("m.pt", [*LINEAR_VIT, "--part", "backbone"], "MODEL.TYPE linear_vit has no backbone"),
    ],
)
def test_mistakes(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], name: str, args: list[str], message: str
) -> None:
    (tmp_path / "there.pt").write_text("mine")
    resume = [] if "--resume" in args else ["--resume", str(weights)]
    assert exit_code(export.main, [str(tmp_path / name), "--cfg", CFG, *resume, *args, "--opts", *OPTS]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("w.pth: EMA weights")]
    assert len(lines) == 1
    assert message in lines[0]
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_latencies_are_medians_of_calls_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    ticks = iter([0, 9] * 2 + [0, 0.003, 0, 0.5] * 8 + [0, 8, 0, 9] * 7)  # the first call of each is warm-up
    monkeypatch.setattr(export_formats.time, "perf_counter", lambda: next(ticks))
    runners = {name: lambda _, name=name: calls.append(name) for name in "ab"}
    medians = export_formats.milliseconds(runners, torch.zeros(1, 3, 8, 8))
    assert medians == pytest.approx({"a": 3, "b": 500})
    assert calls == ["a", "b"] * (export_formats.ROUNDS + 1)


@pytest.mark.slow
def test_benchmark(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_formats.torch, "compile", lambda model: model)  # which takes long
    assert run(tmp_path / "m.pt", weights, "torchscript", "--size", "32", "--benchmark") == 0
    out = capsys.readouterr().out
    assert "one image of 32x32, torch threads 1, median of 15 calls in turns" in out
    assert all(re.search(rf"^{name} +\d+\.\d ms$", out, re.M) for name in ("PyTorch", "torch.compile", "torchscript"))

from functools import partial
from pathlib import Path

import pytest
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from downstream.detection import benchmark
from downstream.detection.config import load_config
from downstream.detection.evaluation_speed import HEAD

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("MODEL.DETECTOR.MAX_PROPOSALS", "20", "MODEL.DETECTOR.ROI_SAMPLES", "16", "MODEL.DETECTOR.WIDTH", "32")
    monkeypatch.setattr(benchmark, "load_config", lambda path, opts: load_config(path, [*opts, *few]))
    numbers = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16}
    monkeypatch.setattr(benchmark, "maskrcnn_resnet50_fpn", partial(maskrcnn_resnet50_fpn, **numbers))
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "WARMUP_CALLS", 0)


def test_a_row_for_each_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All models have the same number of detections, from the same number of candidates."""
    small = ["--height", "64", "--width", "90", "--train-batches", "1", "--test-batches", "1", "--seconds", "0"]
    table = tmp_path / "new" / "table.md"
    assert benchmark.main(["--models", "timm:test_convnext", "torchvision", *small, "--output", str(table)]) == 0
    rows = [line.split(" | ") for line in table.read_text().splitlines()[4:]]
    assert [row[0].removeprefix("| ") for row in rows] == ["timm:test_convnext"] * 2 + ["torchvision"] * 2
    assert [row[1] for row in rows] == ["train", "inference"] * 2
    assert all(float(row[3]) > 0 for row in rows)
    assert [row[4] == "" for row in rows] == [True, False] * 2  # the backbone's share
    (note,) = {row[6].removesuffix(" |").removesuffix(", CUDA graphs") for row in rows if row[1] == "inference"}
    assert int(note.removesuffix(" detections per image")) > 0
    assert table.read_text() == capsys.readouterr().out
    assert table.with_suffix(".png").stat().st_size > 10_000


def test_evaluation_from_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for a few images, then one for all, with detections in each; torchvision's detector has no evaluation."""
    monkeypatch.setattr(benchmark, "WARMUP_IMAGES", 2)
    opts = ["TEST.SHORT_SIDE", "64", "TEST.LONG_SIDE", "96"]
    load = benchmark.load_config
    monkeypatch.setattr(benchmark, "load_config", lambda path, given: load(path, [*given, *opts]))
    table = tmp_path / "results" / "evaluation.md"
    args = ["--models", "timm:test_convnext", "torchvision", "--evaluation", "7", "--output", str(table)]
    assert benchmark.main(args) == 0
    text = capsys.readouterr().out
    assert text.endswith(table.read_text())
    lines = text.splitlines()
    rows = [line.split(" | ") for line in lines[lines.index(HEAD[-1]) + 1 :] if line.startswith("| ")]
    assert [row[:2] for row in rows] == [["| timm:test_convnext", count] for count in ("2", "7")]
    assert all(float(row[3]) >= float(row[5]) > 0 for row in rows)
    assert all(int(row[6].split()[0]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--models", "resnet"], "error: --models resnet: known are mlla_t"),
        (
            ["--models", "torchvision", "--evaluation", "2"],
            "error: --models torchvision: its detector has no --evaluation",
        ),
    ],
)
def test_models_that_cannot_be_measured(capsys: pytest.CaptureFixture[str], args: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main([*args, "--height", "64", "--width", "64"])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_compiling_without_a_compiler_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_regions(model: nn.Module, mode: str) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

        assert mode == "default"
        model.register_forward_pre_hook(fail)

    monkeypatch.setattr(benchmark, "compile_regions", compile_regions)
    sizes = ["--height", "64", "--width", "64", "--train-batches", "1", "--test-batches", "--seconds", "0"]
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--models", "timm:test_convnext", "--compile", *sizes])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "| timm:test_convnext | train" in out
    assert err.startswith("error: --compile: torch.compile needs a C++ compiler")

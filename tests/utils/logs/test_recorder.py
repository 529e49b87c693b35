import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from models import MLLA
from tests.helpers import MICRO
from utils.logs.logger import start_logging
from utils.logs.plots import CLASSIFIER_PANELS
from utils.logs.recorder import IMAGE_SIDE, MAX_PARTS, MAX_VALUES, RunRecorder, read_records, weight_samples


def test_weight_samples_by_part() -> None:
    """At most MAX_VALUES per part, evenly spaced; items of lists are parts, and parts without weights are not."""
    model = nn.Module()
    model.stem = nn.Linear(3, 2)
    model.layers = nn.ModuleList([nn.Linear(200, 200), nn.Identity(), nn.Linear(4, 4)])
    model.drop = nn.Dropout()
    samples = weight_samples(model)
    assert {name: len(values) for name, values in samples.items()} == {
        "stem": 8,
        "layers.0": 8040,  # each fifth of 40,000 and of 200
        "layers.2": 20,
    }
    assert np.array_equal(samples["layers.0"][:8000], model.layers[0].weight.detach().flatten()[::5].numpy())


def test_histograms_of_the_parts_of_an_mlla(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, 0, CLASSIFIER_PANELS)
    recorder.add_details(1, weight_samples(MLLA(**MICRO)), None)
    recorder.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    names = events.Tags()["histograms"]
    assert names == [f"weights/{name}" for name in ("patch_embed", *(f"layers.{i}" for i in range(4)), "norm", "head")]
    for name in names:
        (event,) = events.Histograms(name)
        assert event.step == 1
        assert len(event.histogram_value.bucket) <= 66


def test_weight_samples_are_limited_and_finite() -> None:
    model = nn.ModuleDict({str(i): nn.Linear(1, 1) for i in range(MAX_PARTS + 3)})
    model["0"].weight.data.fill_(torch.nan)
    samples = weight_samples(model)
    assert len(samples) == MAX_PARTS
    assert samples["0"].tolist() == model["0"].bias.tolist()
    many = nn.ModuleDict({"a": nn.ModuleDict({str(i): nn.Linear(50, 50) for i in range(30)})})
    assert 0.9 * MAX_VALUES < len(weight_samples(many)["a"]) <= MAX_VALUES


def test_metrics_are_json_whatever_the_run_does(tmp_path: Path) -> None:
    """JSON has no NaN; and lines of others are no records."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0, "loss": 1.5}\n{"epoch": "x"}\n{"epoch": 1, "loss": NaN}\n[1]\n{"epoch": 2')
    recorder = RunRecorder(tmp_path, 2, CLASSIFIER_PANELS)
    recorder.add({"epoch": 2, "loss": math.nan, "lr": math.inf, "acc1": 1.0}, {"epoch": 2, "steps": None})
    recorder.draw_curves(is_last=True)
    recorder.close()

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    assert [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()] == [
        {"epoch": 0, "loss": 1.5},
        {"epoch": 1, "loss": None},
        {"epoch": 2, "loss": None, "lr": None, "acc1": 1.0},
    ]


def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are written with the next ones."""
    start_logging(tmp_path, rank=0)
    recorder = RunRecorder(tmp_path, 0, CLASSIFIER_PANELS)
    recorder.path = tmp_path / "gone" / "metrics.jsonl"
    recorder.add({"epoch": 0}, {"epoch": 0})
    recorder.draw_curves(is_last=True)
    assert "gone: metrics could not be written (No such file or directory)" in capsys.readouterr().out
    recorder.path.parent.mkdir()
    recorder.add({"epoch": 1}, {"epoch": 1})
    recorder.add({"epoch": 2}, {"epoch": 2})
    recorder.close()
    assert read_records(recorder.path) == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}]


def test_whatever_fails_in_a_record_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect of matplotlib")

    (tmp_path / "metrics.jsonl").write_text('{"epoch": "first"}\n{"epoch": 0}\n[]\n')
    start_logging(tmp_path, rank=0)
    monkeypatch.setattr("utils.logs.recorder.plot_curves", fail)
    recorder = RunRecorder(tmp_path, 1, CLASSIFIER_PANELS)
    recorder.draw_curves(is_last=True)
    recorder.add({"epoch": 1, "loss": "text"}, {"epoch": 1})
    said = capsys.readouterr().out
    assert "metrics could not be written (RuntimeError: a defect of matplotlib)" in said
    assert read_records(recorder.path) == [{"epoch": 0}, {"epoch": 1, "loss": "text"}]


def test_large_images_are_resized(tmp_path: Path) -> None:
    Image.effect_noise((3000, 1500), 60).save(tmp_path / "noise.png")
    recorder = RunRecorder(tmp_path, 0, CLASSIFIER_PANELS)
    recorder.add_details(4, {}, tmp_path / "noise.png")
    recorder.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    (event,) = events.Images("predictions")
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert (image.format, event.step) == ("PNG", 4)
    assert image.size == (event.width, event.height) == (IMAGE_SIDE, IMAGE_SIDE // 2)

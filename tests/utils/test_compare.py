"""utils.compare, and the reading of a run's folder in utils/tools/run_history.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers import exit_code
from utils import compare
from utils.tools.run_history import RunFolderError, best_and_last, read_run, select_panels

Compare = Callable[..., tuple[int, str, str]]


def make_run(folder: Path, accuracies: list[float], *, settings: str = "", **metrics: list[float]) -> Path:
    """Make a run with one line per epoch in metrics.jsonl and speed.jsonl."""
    folder.mkdir(parents=True)
    columns = {"acc1": accuracies, **metrics}
    records = [{"epoch": i, **{k: v[i] for k, v in columns.items()}} for i in range(len(accuracies))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    speeds = [{"epoch": i, "images_per_second": 100.0 * (i + 1)} for i in range(len(accuracies))]
    (folder / "speed.jsonl").write_text("".join(json.dumps(speed) + "\n" for speed in speeds))
    (folder / "config.yaml").write_text(f"TAG: {folder.name}\nTRAIN: {{EPOCHS: 3, COOLDOWN_EPOCHS: 1}}\n{settings}")
    return folder


@pytest.fixture
def run_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    """A function that runs the command in a folder of its own: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: Any) -> tuple[int, str, str]:
        return exit_code(compare.main, args), *capsys.readouterr()

    return run


@pytest.mark.slow
def test_table_and_plot(run_compare: Compare, tmp_path: Path) -> None:
    a = make_run(tmp_path / "m" / "a", [10, 30, 20], ema_acc1=[5, 6, 7], loss=[3, 1, 2], settings="SEED: 1\nAMP: true")
    b = make_run(tmp_path / "m" / "b", [10, 90, 80, 90], loss=[3, 2, 1, 1.5], settings="SEED: 2\nAMP: true")
    code, out, err = run_compare(a, b)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    heading, _, first, second = rows[:4]
    assert heading == [
        *("run", "epochs", "acc1, best (epoch)", "acc1, last", "ema_acc1, best (epoch)", "ema_acc1, last"),
        *("loss, last", "images/s, median"),
    ]
    assert first == ["a", "3 of 4", "30 (2)", "20", "7 (3)", "7", "2", "200"]
    assert second == ["b", "4", "90 (4)", "90", "", "", "1.5", "250"]
    assert rows[4:] == [["key", "a", "b"], rows[5], ["SEED", "1", "2"]]  # neither TAG nor equal settings
    assert "curves: comparison.png" in out
    with Image.open(tmp_path / "comparison.png") as plot:
        pixels = np.asarray(plot.convert("RGB")).reshape(-1, 3)
    assert plot.size[0] > 1000
    for color in ((31, 119, 180), (255, 127, 14)):  # of the first and of the second run
        assert (pixels == color).all(axis=1).sum() > 100
    assert run_compare(a, b)[0] == 0  # replaces its own plot


def test_selected_metrics(run_compare: Compare, tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [1, 2], grad_norm=[4, 5], loss=[2, 3])
    code, out, _ = run_compare(a, "--keys", "grad_norm", "loss", "--output", "out.svg")
    assert code == 0
    assert "grad_norm, last" in out
    assert "| loss, best (epoch) | loss, last |" in out
    assert "| 2 (1)              | 3          |" in out  # the lower one
    assert "acc1" not in out
    assert (tmp_path / "out.svg").read_text().lstrip().startswith("<?xml")
    assert run_compare(a, "--keys", "los") == (
        2,
        "",
        "error: --keys los: no run has this metric; did you mean loss?\n",
    )


def test_names_tell_runs_apart(run_compare: Compare, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / model / "default", [1]) for model in ("x", "y")]
    assert "| x/default |" in run_compare(*runs)[1]
    assert "no setting differs" not in run_compare(runs[0])[1]  # one alone
    code, _, err = run_compare(runs[0], tmp_path / "y" / ".." / "x" / "default")
    assert code == 2
    assert "is named twice" in err


def test_a_run_that_is_being_written(run_compare: Compare, tmp_path: Path) -> None:
    """The last line is cut in the middle of a character; an epoch that ran twice counts as it ran last."""
    run = make_run(tmp_path / "a", [1, 2])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"epoch": 2, "acc1": 3.0, "note": "ü'.encode()[:-1])
    with (run / "speed.jsonl").open("a") as file:
        file.write('{"epoch": 1, "images_per_second": 700.0}\n{"epoch": 2, "images_per_second": 1.0}\n{"epo')
    assert read_run(run).records == [
        {"epoch": 0, "acc1": 1, "images_per_second": 100.0},
        {"epoch": 1, "acc1": 2, "images_per_second": 700.0},
    ]
    assert run_compare(run)[0] == 0


def test_mistakes(run_compare: Compare, tmp_path: Path) -> None:
    run = make_run(tmp_path / "out" / "a", [1])
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[list[object], str]] = [
        ([empty], "empty: holds no metrics.jsonl; name the folder of a run"),
        ([tmp_path / "gone"], "gone: holds no metrics.jsonl"),
        ([tmp_path / "out"], f"out: holds no metrics.jsonl; in it are {run}"),
        ([run, "--output", "a.gif"], "a.gif: the file name must end in .png, .svg or .pdf"),
        ([run, "--output", "gone/a.png"], "there is no folder gone"),
    ]
    for args, message in cases:
        code, out, err = run_compare(*args)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    (tmp_path / "mine.png").write_bytes(b"a picture of someone's")
    code, _, err = run_compare(run, "--output", "mine.png")
    assert (code, (tmp_path / "mine.png").read_bytes()) == (2, b"a picture of someone's")
    assert "replace it with --force" in err
    assert run_compare(run, "--output", "mine.png", "--force")[0] == 0
    (run / "metrics.jsonl").write_text('{"epoch": 0, "acc')
    with pytest.raises(RunFolderError, match="no epoch is complete yet"):
        read_run(run)
    (run / "metrics.jsonl").write_text('{"epoch": 0, "odd": 1}\n{"epoch": "1"}\n')
    (run / "speed.jsonl").unlink()
    assert "nothing to plot among odd" in run_compare(run)[2]


def test_metrics_that_are_not_finite_or_missing(run_compare: Compare, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [1, 2, 3], loss=[2, float("nan"), float("inf")], lr=[float("nan")] * 3)
    records = read_run(run).records
    assert best_and_last(records, "loss") == (2, 1, 2)
    assert best_and_last(records, "lr") is None
    assert best_and_last(records, "images_per_second") == (None, None, 300)
    assert run_compare(run, "--keys", "lr")[0] == 0


def test_of_equal_values_the_later_is_the_best(tmp_path: Path) -> None:
    """As in max_acc.pth."""
    records = read_run(make_run(tmp_path / "a", [1, 3, 3, 2], loss=[2, 1, 1, 4])).records
    assert (best_and_last(records, "acc1"), best_and_last(records, "loss")) == ((3, 3, 2), (1, 3, 4))


def test_metrics_of_dense_tasks() -> None:
    names = ["box_AP", "ema_box_AP", "mask_AP", "miou", "train_loss", "lr"]
    assert [list(panel.curves) for panel in select_panels(names)] == [
        *(["box_AP", "ema_box_AP"], ["mask_AP"], ["miou"], ["train_loss"], ["lr"])
    ]

"""The table of --throughput: several processes beside one, and the official code's speed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_python
from utils.benchmark.measure import Throughput
from utils.benchmark.throughput import draw_bars, throughput_table, write_row
from utils.logs.output_dir import OutputError

ROW = Throughput(
    *("mlla_tiny", "training", "NVIDIA H200", "2.11.0", "bfloat16", "channels_last", "reduce-overhead"),
    **{"batch": 128, "size": 224, "processes": 1, "images_per_second": 4700.0, "milliseconds_per_batch": 27.2},
    **{"memory_mib": 6900.0, "rounds": 5, "batches_per_round": 30},
)


def cells(rows: list[Throughput]) -> list[dict[str, str]]:
    """Return the table's cells by heading; columns are separated by two spaces."""
    heading, *lines = throughput_table(rows).splitlines()
    names = [name.strip() for name in heading.split("  ") if name.strip()]
    return [dict(zip(names, [c.strip() for c in line.split("  ") if c.strip()], strict=False)) for line in lines]


def test_the_official_code_stands_beside_the_same_work() -> None:
    together = replace(ROW, processes=2, images_per_second=9200.0, scaling=97.872)
    (two,) = cells([together])
    assert (two["img/s"], two["scaling"], two["official code"]) == ("9200.0", "97.9%", "1034")
    assert cells([ROW])[0]["official code"] == "672"
    for other in (replace(ROW, chip="NVIDIA A100"), replace(ROW, size=384), replace(ROW, batch=64)):
        assert "official code" not in cells([other])[0]  # a column without values is left out
    assert "scaling" not in cells([ROW])[0]


def test_the_chart_has_a_bar_of_the_official_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("utils.benchmark.throughput.plot_bars", lambda *bars, **rest: drawn.update(rest, bars=bars))
    draw_bars([ROW, replace(ROW, model="timm:resnet50"), replace(ROW, batch=64)], tmp_path / "chart.png")
    labels, values = drawn["bars"]
    assert [label.split(",")[0] for label in labels] == [
        *("mlla_tiny", "official code (float16)", "timm:resnet50", "mlla_tiny"),
    ]
    assert list(values) == [4700, 672, 4700, 4700]
    assert len(set(drawn["colors"][:3])) == 3


def test_a_row_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "throughput.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"throughput\.jsonl: cannot be written"):
        write_row(tmp_path, ROW)


@pytest.mark.slow
def test_two_processes_are_compared_with_one(tmp_path: Path) -> None:
    done = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py", "--cfg", "cfgs/digits.yaml"),
        *("--throughput", "--train", "--batch-size", "2", "--output", tmp_path, "--opts", "AUG.MESA", "0"),
        *("MODEL.MLLA.EMBED_DIM", "8", "MODEL.MLLA.NUM_HEADS", "[1, 1, 1, 1]"),
        forked=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "mlla_digits" / "default" / "throughput.jsonl").read_text().splitlines()
    alone, together = map(json.loads, lines)
    assert (alone["processes"], together["processes"]) == (1, 2)
    assert (alone["scaling"], alone["alone"]) == (None, [])
    assert (len(together["alone"]), together["alone"][0]) == (2, alone["images_per_second"])
    assert together["scaling"] == pytest.approx(100 * together["images_per_second"] / sum(together["alone"]))

"""The benchmark's command: stages of all pipelines, and of the measurement with training the command that it runs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import main
from config import load_config
from data import benchmark, benchmark_tables
from data.photographs import save_photographs
from utils.config import command_line


@pytest.mark.parametrize("processes", [1, 2])
def test_end_to_end_measures_in_the_programs_own_process(
    processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def call(command: list[str], **_: Any) -> int:
        seen.append(command)
        folder = Path(command[command.index("--data-path") + 1])
        files = {split: list((folder / split).glob("*/*.jpg")) for split in ("train", "val")}
        assert {split: len(paths) for split, paths in files.items()} == {"train": 40, "val": 8}
        assert len({path.stat().st_ino for path in files["train"]}) == 12  # the others are links, which take no space
        return 3

    monkeypatch.setattr(subprocess, "call", call)
    args = ["--images", "40", "--eval-images", "8", "--batch-sizes", "4", "16", "--processes", str(processes)]
    assert benchmark.main(["--end-to-end", *args, "--output", str(tmp_path), "--opts", "AUG.MESA", "0"]) == 3
    ((python, *command),) = seen
    assert python == sys.executable
    assert command[:2] == (["main.py", "--cfg"] if processes == 1 else ["-m", "torch.distributed.run"])
    parsed = command_line.parse_command_line("", command[command.index("main.py") + 1 :], schema=main.SCHEMA)
    config = main.load_config(*parsed)
    assert Path(config.OUTPUT) == tmp_path
    assert (config.BENCHMARK.LOADING, config.AUG.MESA) == ("4,16", 0)


def test_the_stages_of_each_pipeline_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also of what a GPU would be left, which workers prepare without one."""
    save_photographs(tmp_path, 4, 4)
    config = load_config("cfgs/mlla_t.yaml", ["DATA.DATA_PATH", str(tmp_path), "DATA.NUM_WORKERS", "0"])
    monkeypatch.setattr(benchmark_tables, "BATCH", 2)
    for make, last in ((benchmark.training_pipelines, "DECODE_ON gpu"), (benchmark.evaluation_pipelines, "fast")):
        pipelines = make(config)
        seconds = {name: pipeline.seconds(2) for name, pipeline in pipelines.items()}
        assert list(seconds)[-1] == last
        assert all(of["decode"] > 0 and of["collate"] > 0 for of in seconds.values())
        assert all(pipeline.images_per_second(0) > 0 for pipeline in pipelines.values())


def test_too_few_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--images", "40"])
    assert "at least 96" in capsys.readouterr().err

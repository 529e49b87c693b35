import json
import subprocess
from pathlib import Path

import pytest
import torch

from utils.distributed.process import Process
from utils.logs import environment
from utils.logs.environment import commit, record_environment

HERE = Process(0, 2, torch.device("cpu"))


def git(folder: Path, *args: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *who, *args], capture_output=True, text=True, check=True).stdout.strip()


def test_each_start_adds_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", "--tag", "two words"])
    record_environment(tmp_path, HERE, epoch=0)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    record_environment(tmp_path, HERE, epoch=5)
    first, second = map(json.loads, (tmp_path / "environment.jsonl").read_text().splitlines())
    assert (first["epoch"], second["epoch"], first["machines"], second["machines"]) == (0, 5, 1, 2)
    assert first["command"] == "main.py --tag 'two words'"
    assert (first["processes"], first["cuda"]) == (2, None)
    assert first["device"]
    assert first["packages"]["torch"].startswith(str(torch.__version__).split("+")[0])
    assert environment.version_of("no-such-package") is None


def test_commit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project, which installs this one")
    assert commit(tmp_path) is None
    (tmp_path / "main.py").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    assert commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "main.py").write_text("b")
    assert commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None  # no git


@pytest.mark.parametrize(
    ("flags", "siblings", "expected"),
    [
        ("fpu hypervisor sse", ["0-1", "0-1", "2-3", "2-3"], "4 vCPUs of 2 physical cores"),
        ("fpu hypervisor", ["0", "1", "2", "3"], "4 vCPUs"),
        ("fpu", ["0,4", "1,5", "0,4", "1,5"], "4 hardware threads of 2 physical cores"),
        ("fpu", ["0", "1", "2", "3"], "4 physical cores"),
        ("fpu", [], "4 CPUs"),
    ],
)
def test_processors_are_named_as_what_they_are(
    flags: str, siblings: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    (tmp_path / "info").write_text(f"flags : {flags}\n")
    for cpu, text in enumerate(siblings):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{text}\n")
    assert environment.describe_cores(tmp_path / "info", tmp_path) == expected

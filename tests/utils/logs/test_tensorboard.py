"""Event files on disks that fill, and in folders that vanish."""

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.logs.atomic_write import append_atomic
from utils.logs.tensorboard import EventFile


@pytest.fixture
def limit() -> Iterator[Callable[[int | None], None]]:
    """Return a function that limits the size of files, as a full disk does, in the middle of a write."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_events_after_a_full_disk(tmp_path: Path, limit: Callable[[int | None], None]) -> None:
    """What did not fit leaves nothing behind, and what follows can be read."""
    file = EventFile(tmp_path, purge_step=0)
    file.add_scalar("loss", 1.0, 0)
    threads = threading.active_count()
    limit(file.path.stat().st_size + 10)
    with pytest.raises(OSError, match="File too large"):
        file.add_scalar("loss", 2.0, 1)
    limit(None)
    file.add_scalar("loss", 3.0, 2)
    assert threading.active_count() == threads
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 1.0), (2, 3.0)]


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    file = EventFile(tmp_path / "run", purge_step=0)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        file.add_scalar("loss", 1.0, 0)


def test_later_files_replace_steps_of_earlier_ones(tmp_path: Path) -> None:
    first = EventFile(tmp_path, purge_step=0)
    for step in range(3):
        first.add_scalar("loss", 1.0, step)
    EventFile(tmp_path, purge_step=2).add_scalar("loss", 5.0, 2)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 1.0), (1, 1.0), (2, 5.0)]


def test_an_addition_that_does_not_fit_leaves_the_file_as_it_was(
    tmp_path: Path, limit: Callable[[int | None], None]
) -> None:
    path = tmp_path / "metrics.jsonl"
    append_atomic(path, b"first\n")
    limit(8)
    with pytest.raises(OSError, match="File too large"):
        append_atomic(path, b"second\n")
    limit(None)
    append_atomic(path, b"third\n")
    assert path.read_bytes() == b"first\nthird\n"

"""Loader workers that do not come to life."""

import logging
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from data import workers
from data.workers import WatchfulDataLoader
from tests.helpers import is_running, wait_for

NUMBERS = list(range(6))


def deaf_at_first(folder: Path, deaf_starts: int, number: int) -> None:
    """Worker 1 hangs in its first starts and heeds no signal but SIGKILL, as if it waited for a lock in a fork."""
    marks = len(list(folder.iterdir()))
    if number == 1 and marks < deaf_starts:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / str(os.getpid())).touch()
        time.sleep(600)


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_SECONDS", 1.5)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.3)  # how long it waits for their end


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_are_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, persistent: bool) -> None:
    set_up = partial(deaf_at_first, tmp_path, 1)
    loader = WatchfulDataLoader(
        NUMBERS, batch_size=2, num_workers=2, persistent_workers=persistent, set_up_worker=set_up
    )
    with caplog.at_level(logging.WARNING, logger="mlla"):
        batches = [batch.tolist() for batch in loader]
    assert batches == [[0, 1], [2, 3], [4, 5]]
    assert caplog.messages == ["a loader worker did not start within 1.5 s; all are started again"]
    assert [batch.tolist() for batch in loader] == batches
    (deaf,) = (int(mark.name) for mark in tmp_path.iterdir())
    wait_for(lambda: not is_running(deaf))


def test_workers_that_never_start_end_the_run(tmp_path: Path) -> None:
    loader = WatchfulDataLoader(NUMBERS, num_workers=2, set_up_worker=partial(deaf_at_first, tmp_path, 99))
    with pytest.raises(RuntimeError, match=r"did not start, 3 times in a row; lower DATA\.NUM_WORKERS"):
        next(iter(loader))
    assert len(list(tmp_path.iterdir())) == 3


def refuse(_: int) -> None:
    raise ValueError("cannot be set up")


def test_what_setting_up_raises_is_seen() -> None:
    with pytest.raises(ValueError, match="cannot be set up"):
        next(iter(WatchfulDataLoader(NUMBERS, num_workers=1, set_up_worker=refuse)))


def test_no_workers_no_watch() -> None:
    assert [int(batch) for batch in WatchfulDataLoader(NUMBERS, batch_size=None, set_up_worker=refuse)] == NUMBERS

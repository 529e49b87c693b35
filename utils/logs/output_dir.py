"""Where a run's results go, and the configuration that is kept beside them."""

import fcntl
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

from utils.checkpoint.files import Progress, checkpoints_in, link_checkpoint
from utils.config.yaml_file import read_yaml
from utils.logs.logger import logger, start_logging

LOCK_SECONDS = 10.0


def open_output_dir(output: str, name: str, tag: str, *, rank: int) -> Path:
    """Make <output>/<name>/<tag> and start this process's log in it.

    Raises:
        ValueError: it cannot be made or written.
    """
    folder = Path(output) / name / tag
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start_logging(folder, rank)
    except OSError as error:
        raise ValueError(f"OUTPUT {output!r}: cannot write to {folder} ({error.strerror}); change --output") from error
    return folder


class RunLock:
    """Holds a run's folder, so that no second run writes into it. It ends with the process, however that ends.

    Raises:
        ValueError: another process holds it, and still does after LOCK_SECONDS; says which, and on which host.
    """

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "run.lock").open("a+")
        deadline = time.monotonic() + LOCK_SECONDS  # a former run may be about to end
        while not self.is_taken():
            if time.monotonic() > deadline:
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                self.file.close()
                raise ValueError(f"{folder}: a run writes here already, {holder}; stop it, or name another --tag")
            time.sleep(0.2)
        self.file.seek(0)
        self.file.truncate()
        self.file.write(f"pid {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        self.file.flush()
        for leftover in folder.glob("*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()

    def is_taken(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def save_config(folder: Path, text: str) -> None:
    """Write config.yaml, for `--cfg` to read again; a former one that differs is kept under another name."""
    path = folder / "config.yaml"
    temporary = folder / "config.yaml.tmp"
    temporary.write_text(text)
    if path.exists() and path.read_bytes() != temporary.read_bytes():
        backup = unused_name(folder, "config_{}.yaml")
        path.rename(backup)
        logger.warning(
            "the configuration changed, the former one is kept as %s: %s", backup, differences(backup, temporary)
        )
    temporary.replace(path)


def differences(former: Path, present: Path) -> str:
    """What differs between two configuration files, as "SECTION.KEY former -> present; ..."."""
    try:
        old, new = read_yaml(former), read_yaml(present)
    except ValueError:  # a run was killed while it wrote the file
        return "the former one cannot be read"
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in changed)


def move_replaced_checkpoints(folder: Path, progress: Progress, *, continues: bool) -> None:
    """Move checkpoints that are further than `progress`, whose steps run again (or that could not be read), to a folder
    replaced_<n>, so that nothing is lost. Where the folder's run does not go on but another starts, keep a second name
    of its best ones there too.
    """
    later = [path for other, path in checkpoints_in(folder) if other > progress]
    best = [] if continues else list(folder.glob("max_*.pth"))
    if not later and not best:
        return
    target = unused_name(folder, "replaced_{}")
    target.mkdir()
    for path in later:
        path.rename(target / path.name)
    for path in best:
        link_checkpoint(path, target / path.name)
    logger.warning("%s held a run already; what this one replaces is kept in %s", folder, target)


def unused_name(folder: Path, pattern: str) -> Path:
    """The first of pattern.format(1), pattern.format(2), ... that is not there yet."""
    number = 1
    while (path := folder / pattern.format(number)).exists():
        number += 1
    return path

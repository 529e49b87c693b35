"""Where a run's results go, and the configuration that is kept beside them."""

import os
import socket
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from utils.checkpoint.files import Progress, checkpoints_in, link_checkpoint
from utils.config.errors import UserError
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


def lock_output_dir(folder: Path) -> AbstractContextManager[object]:
    """Lock an output folder against a second run. The lock ends with the process, however that ends.

    The holder is named in a file of its own, since filelock may truncate run.lock when another process tries to lock.

    Returns:
        The lock, already held; leaving its context releases it.

    Raises:
        UserError: another run holds it, and still does after LOCK_SECONDS.
    """
    holder = folder / "run_holder.txt"
    try:
        lock = FileLock(folder / "run.lock").acquire(LOCK_SECONDS, 0.2)  # the last run may be about to end
    except Timeout as error:
        name = holder.read_text().strip() if holder.is_file() else "another process"
        raise UserError(f"{folder}: a run writes here already, {name}; stop it, or use another --tag") from error
    holder.write_text(f"pid {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
    for leftover in folder.glob("*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    return lock


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

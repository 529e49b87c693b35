"""Where a run's results go, and the configuration that is kept beside them."""

from pathlib import Path

from utils.checkpoint import checkpoints_in, link_checkpoint
from utils.logger import logger, start_logging
from utils.yaml_file import read_yaml


def open_run_folder(output: str, name: str, tag: str, *, rank: int) -> Path:
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


def write_config(folder: Path, text: str) -> None:
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


def set_aside_checkpoints(folder: Path, from_epoch: int, *, continues: bool) -> None:
    """Move checkpoints of epochs that run again (or that could not be read) to a folder replaced_<n>, so that nothing
    is lost. Where the folder's run does not go on but another starts, keep a second name of its best ones there too.
    """
    later = [path for epoch, path in checkpoints_in(folder) if epoch >= from_epoch]
    best = [] if continues else list(folder.glob("max_*acc.pth"))
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

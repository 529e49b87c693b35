"""Where a run's results go, and the configuration that is kept beside them."""

from pathlib import Path

from utils.logger import logger, start_logging


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
    if path.exists() and (former := path.read_text()) != text:
        number = 1
        while (backup := folder / f"config_{number}.yaml").exists():
            number += 1
        path.rename(backup)
        changed = [line.strip() for line in text.splitlines() if line not in former.splitlines()]
        logger.warning("the configuration changed, the former one is kept as %s: %s", backup, "; ".join(changed))
    path.write_text(text)

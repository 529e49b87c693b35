"""Where a run's results go, and the configuration that is kept beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

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
        changes = "; ".join(differences(yaml.safe_load(former), yaml.safe_load(text)))
        logger.warning("the configuration changed, the former one is kept as %s: %s", backup, changes)
    path.write_text(text)


def differences(former: Any, present: Any, name: str = "") -> Iterator[str]:
    """What differs between two nested dictionaries, as "SECTION.KEY former -> present"."""
    if isinstance(former, dict) and isinstance(present, dict):
        for key in sorted({*former, *present}):
            yield from differences(former.get(key), present.get(key), f"{name}.{key}" if name else key)
    elif former != present:
        yield f"{name} {former} -> {present}"

"""Weights & Biases: a run's metrics, if LOG.WANDB names a project. Training never waits for its network."""

import contextlib
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.config.errors import UserError
from utils.logs.logger import logger
from utils.logs.output_dir import output_errors

INIT_SECONDS = 30.0  # to reach the server; after that metrics are kept on this disk
FINISH_SECONDS = 20.0  # for the rest of the upload; a launcher kills 30 s after SIGTERM


class WandbError(UserError):
    """Weights & Biases cannot be used as LOG.WANDB asks: names the cause and the remedy."""


class WandbLogger:
    """Logs to a W&B run, whose id is kept in <folder>/wandb_id.txt so that it resumes with this run. Main process only.

    Args:
        project: value of LOG.WANDB.
        folder: the run's output folder; W&B's own files go into <folder>/wandb.
        config: settings by dotted key.
        continues: True to resume the W&B run of this folder, False to start another.

    Raises:
        OutputError: the folder cannot be written.
        WandbError: the package is missing, or has no API key. An unreachable server is only a warning.
    """

    def __init__(self, project: str, folder: Path, *, config: Mapping[str, Any], continues: bool) -> None:
        self.wandb = import_wandb()
        path = folder / "wandb_id.txt"
        if not (continues and path.is_file() and path.read_text().strip()):
            with output_errors(folder):
                path.write_text(secrets.token_hex(4) + "\n")
        self.folder = folder
        wanted = {
            "project": project,
            "name": "/".join(folder.parts[-2:]),
            "dir": str(folder),
            "id": path.read_text().strip(),
            "resume": "allow",
            "config": dict(config),
        }
        try:
            with no_questions():
                self.run = self.wandb.init(**wanted, settings=self.settings())
        except self.wandb.errors.UsageError as error:
            raise WandbError(
                f"LOG.WANDB {project!r}: {one_line(error)} (or keep the metrics on this disk: WANDB_MODE=offline)"
            ) from error
        except (self.wandb.errors.CommError, OSError) as error:
            logger.warning(
                "Weights & Biases cannot be reached (%s); its metrics are kept in %s, for `wandb sync`",
                *(one_line(error), folder / "wandb"),
            )
            self.wandb.teardown()  # else the run counts as in use
            self.run = self.wandb.init(**wanted, mode="offline", settings=self.settings())
        self.has_failed = False
        # An epoch that is interrupted after it was logged is logged again, which W&B's own step count does not allow.
        self.guarded(lambda: (self.run.define_metric("epoch"), self.run.define_metric("*", step_metric="epoch")))
        logger.info("Weights & Biases: %s", f"offline, in {folder / 'wandb'}" if self.run.offline else self.run.url)

    def settings(self) -> Any:
        """Return quiet settings, with those of the time limits that this version of wandb knows."""
        wanted = {
            "console": "off",
            "silent": True,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
        }
        known = getattr(self.wandb.Settings, "model_fields", wanted)
        return self.wandb.Settings(**{name: value for name, value in wanted.items() if name in known})

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Log an epoch's metrics, with its number (from 0) as "epoch"; wandb uploads them in the background."""
        self.guarded(lambda: self.run.log({name: value for name, value in metrics.items() if value is not None}))

    def add_image(self, name: str, path: Path, epoch: int) -> None:
        self.guarded(lambda: self.run.log({name: self.wandb.Image(str(path)), "epoch": epoch}))

    def close(self) -> None:
        """Finish the upload, within FINISH_SECONDS."""
        self.guarded(self.run.finish)

    def guarded(self, work: Callable[[], Any]) -> None:
        """Call `work`; its first failure is a warning, and turns W&B off."""
        if self.has_failed:
            return
        try:
            work()
        except Exception as error:  # of whatever kind: the metrics are in the output folder, and training continues
            self.has_failed = True
            logger.warning("Weights & Biases failed and is turned off (%s)", one_line(error))


@contextlib.contextmanager
def no_questions() -> Iterator[None]:
    """Close standard input: without a key wandb would ask for one, amid the output of several processes."""
    with Path(os.devnull).open() as nothing:
        stdin, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = stdin


def import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise WandbError(f"LOG.WANDB needs the package wandb ({error}): pip install wandb, or set it to ''") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

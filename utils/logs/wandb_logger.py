"""Figures of a run at Weights & Biases, if the configuration names a project. Training never waits for its network."""

import contextlib
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.logs.logger import logger

INIT_SECONDS = 30.0  # to reach the server; then figures are kept on this disk
FINISH_SECONDS = 20.0  # for what is not uploaded yet; a launcher gives 30 after SIGTERM


class WandbError(ValueError):
    """Weights & Biases cannot be used as it is set up: one line with the remedy."""


class WandbLogger:
    """A run there, resumed with the run here: its number is in <folder>/wandb_id.txt. On the first process only.

    Args:
        project: as in LOG.WANDB.
        folder: the run's; W&B's own files go into <folder>/wandb.
        config: settings by dotted key.
        continues: whether the folder's run goes on, rather than another begins.

    Raises:
        WandbError: the package is missing, or has no key. An unreachable server is only a warning.
    """

    def __init__(self, project: str, folder: Path, *, config: Mapping[str, Any], continues: bool) -> None:
        self.wandb = import_wandb()
        path = folder / "wandb_id.txt"
        if not (continues and path.is_file() and path.read_text().strip()):
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
                f"LOG.WANDB {project!r}: {one_line(error)} (or keep the figures on this disk: WANDB_MODE=offline)"
            ) from error
        except (self.wandb.errors.CommError, OSError) as error:
            logger.warning(
                "Weights & Biases cannot be reached (%s); its figures are kept in %s, for `wandb sync`",
                *(one_line(error), folder / "wandb"),
            )
            self.wandb.teardown()  # else the run counts as in use
            self.run = self.wandb.init(**wanted, mode="offline", settings=self.settings())
        self.has_failed = False
        # An epoch that was interrupted after it was logged is logged again: not a step of W&B's own counting.
        self.guarded(lambda: (self.run.define_metric("epoch"), self.run.define_metric("*", step_metric="epoch")))
        place = f"offline, in {folder / 'wandb'}" if self.run.offline else self.run.url
        logger.info("Weights & Biases: %s", place)

    def settings(self) -> Any:
        """Quiet, without a copy of the terminal, and with the time limits that this version of wandb knows."""
        wanted = {
            "console": "off",
            "silent": True,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
        }
        known = getattr(self.wandb.Settings, "model_fields", wanted)
        return self.wandb.Settings(**{name: value for name, value in wanted.items() if name in known})

    def add(self, figures: Mapping[str, Any]) -> None:
        """Log an epoch's figures, its number (from 0) as "epoch"; copied, not waited for."""
        self.guarded(lambda: self.run.log({name: value for name, value in figures.items() if value is not None}))

    def add_picture(self, name: str, picture: Path, epoch: int) -> None:
        self.guarded(lambda: self.run.log({name: self.wandb.Image(str(picture)), "epoch": epoch}))

    def close(self) -> None:
        """Upload what is left, for FINISH_SECONDS at most."""
        self.guarded(self.run.finish)

    def guarded(self, work: Callable[[], Any]) -> None:
        """Do it; at the first failure say so and leave W&B alone from then on."""
        if self.has_failed:
            return
        try:
            work()
        except Exception as error:  # whatever it is: the figures are in the run's folder, and training goes on
            self.has_failed = True
            logger.warning("Weights & Biases failed and is left alone from now on (%s)", one_line(error))


@contextlib.contextmanager
def no_questions() -> Iterator[None]:
    """Within: nothing can be typed. Without a key wandb would ask for one, amid the output of several processes."""
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

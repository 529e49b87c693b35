"""The log and the progress bar."""

import logging
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from termcolor import colored
from tqdm import tqdm

COLORS = {logging.WARNING: "yellow", logging.ERROR: "red"}

logger = logging.getLogger("mlla")


class TerminalHandler(logging.Handler):
    """Writes to standard output, above a progress bar; where there is a bar, lines about steps are skipped."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_step", False) and sys.stdout.isatty():
            return
        clock, _, message = self.format(record).partition(" | ")
        tqdm.write(f"{colored(clock, 'green')} {colored(message, COLORS.get(record.levelno))}", file=sys.stdout)
        sys.stdout.flush()


class LogFile(logging.FileHandler):
    """Log file whose write errors do not end the run; the first is printed to standard error."""

    has_failed = False

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if not self.has_failed:
            self.has_failed = True
            print(f"{self.baseFilename}: the log cannot be written ({sys.exc_info()[1]})", file=sys.stderr)


def start_logging(folder: Path, rank: int) -> None:
    """Log to the terminal (rank 0; other ranks only errors) and to <folder>/log_rank<rank>.txt."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    terminal = TerminalHandler(logging.INFO if rank == 0 else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(asctime)s | %(message)s", "%H:%M:%S"))
    logger.addHandler(terminal)
    file = LogFile(folder / f"log_rank{rank}.txt", delay=rank > 0, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)


class ProgressBar:
    """Progress of an epoch: a bar on a terminal, and a line in the log per report."""

    def __init__(self, epoch: int, total_epochs: int, steps: int, *, done: int, is_main: bool) -> None:
        self.title = f"epoch {epoch + 1}/{total_epochs}"
        self.remaining_epochs = total_epochs - epoch - 1
        self.steps = steps
        self.done = done  # steps done before this process started
        self.bar = tqdm(
            total=steps,
            initial=done,
            desc=self.title,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=not (is_main and sys.stderr.isatty()),
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Count a step that was started."""
        self.bar.update()

    def report(
        self, step: int, *, terms: Mapping[str, float], grad_norm: float, lr: float, rate: float, seconds: float
    ) -> None:
        """Log the state after `step` steps of the epoch.

        Args:
            step: steps done.
            terms: means over the epoch so far of the loss, as "loss", and of its terms.
            grad_norm: gradient norm of the last step.
            lr: learning rate.
            rate: images per second.
            seconds: time for the steps since this process started.
        """
        left = (self.steps - step + self.remaining_epochs * self.steps) * seconds / (step - self.done)
        eta = timedelta(seconds=round(left))
        losses = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        self.bar.set_postfix_str(f"loss {terms['loss']:.4f}, {rate:.0f} img/s, run ends in {eta}")
        logger.info(
            "%s step %d/%d  %s  grad_norm %.3f  lr %.3e  %.0f img/s  eta %s",
            *(self.title, step, self.steps, losses, grad_norm, lr, rate, eta),
            extra={"is_step": True},
        )

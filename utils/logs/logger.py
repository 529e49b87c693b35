"""The log and the progress bars."""

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, TypeVar

from termcolor import colored
from tqdm import tqdm

from utils.config.standard_streams import print_error

COLORS = {logging.WARNING: "yellow", logging.ERROR: "red"}

# Passed as `extra`: on a terminal, details are left to the log file, and an epoch has no clock, to fit into 80 columns.
DETAIL, EPOCH = {"is_detail": True}, {"is_epoch": True}

logger = logging.getLogger("mlla")
Batch = TypeVar("Batch")


class TerminalHandler(logging.Handler):
    """Writes to standard output, above a progress bar; details only where that is not a terminal.

    Write errors, such as a full disk or a pipe without a reader, do not end the run; the log file has the first.
    """

    has_failed = False
    hides_information = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(record)
        except (AttributeError, OSError, ValueError) as error:  # AttributeError: None, for a closed stream
            if not self.has_failed:
                self.has_failed = True
                logger.error("standard output cannot be written (%s); this file has the whole log", error)

    def write(self, record: logging.LogRecord) -> None:
        is_detail = getattr(record, "is_detail", False) or (self.hides_information and record.levelno <= logging.INFO)
        if is_detail and sys.stdout.isatty():
            return
        clock, _, message = self.format(record).partition(" | ")
        start = "" if getattr(record, "is_epoch", False) and sys.stdout.isatty() else f"{colored(clock, 'green')} "
        tqdm.write(f"{start}{colored(message, COLORS.get(record.levelno))}", file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def information_as_details() -> Iterator[None]:
    """Log information of this block, such as tables of metrics, as details."""
    handlers = [handler for handler in logger.handlers if isinstance(handler, TerminalHandler)]
    for handler in handlers:
        handler.hides_information = True
    try:
        yield
    finally:
        for handler in handlers:
            handler.hides_information = False


class LogFile(logging.FileHandler):
    """Log file whose write errors do not end the run; the first is printed to standard error."""

    has_failed = False

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if not self.has_failed:
            self.has_failed = True
            print_error(f"{self.baseFilename}: the log cannot be written ({sys.exc_info()[1]})")


def start_logging(folder: Path, rank: int) -> None:
    """Log to the terminal (rank 0; other ranks only errors) and to <folder>/log_rank<rank>.txt."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    terminal = TerminalHandler(logging.INFO if rank == 0 else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(asctime)s | %(message)s", "%H:%M:%S"))
    logger.addHandler(terminal)
    file = LogFile(folder / f"log_rank{rank}.txt", delay=rank > 0, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)


@contextlib.contextmanager
def errors_logged(failure: str) -> Iterator[None]:
    """Log an exception of any kind as an error, "<failure> (<reason>)", and go on.

    For records and plots of a run, which it does not depend on: they must not end it.
    """
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
        logger.error("%s (%s)", failure, reason)


class StepTimer:
    """Time per step in windows: from one report to the next, without evaluation and without the run's first steps.

    The first steps compile code and record CUDA graphs.

    Args:
        num_untimed: first steps of the process that no window contains.
        clock: returns seconds.
    """

    def __init__(self, num_untimed: int = 5, clock: Callable[[], float] = time.perf_counter) -> None:
        self.num_untimed = num_untimed
        self.clock = clock
        self.last_windows: deque[float] = deque(maxlen=5)  # seconds per step
        self.start_window()

    def start_window(self) -> None:
        self.start, self.steps = self.clock(), 0

    def count_step(self) -> None:
        if self.num_untimed:
            self.num_untimed -= 1
            self.start_window()
        else:
            self.steps += 1

    def end_window(self) -> float | None:
        """Start the next window; return the seconds per step of this one, or None if it has no step."""
        seconds = (self.clock() - self.start) / self.steps if self.steps else None
        if seconds is not None:
            self.last_windows.append(seconds)
        self.start_window()
        return seconds

    def typical(self) -> float | None:
        """Return the median of the last windows, which one with a pause does not change, or None before the first."""
        return median(self.last_windows) if self.last_windows else None


class ErrorsIgnored:
    """Stream for progress bars whose write errors are ignored: a terminal may be gone, or busy.

    tqdm would keep its lock after an error, and the next log line would wait for that forever.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:  # by which tqdm knows the bars that a log line must not cut through
        return other is self or other is self.stream

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def shows_bars(*, is_main: bool) -> bool:
    """Return whether this process draws progress bars: the first one does, on a terminal."""
    return is_main and sys.stderr.isatty()


class ProgressBar:
    """Progress of an epoch: a bar on a terminal, and a line in the log per report.

    Args:
        epoch: number of the epoch, from 0.
        total_epochs: epochs of the run.
        steps: steps of each epoch.
        done: steps of this epoch that are done.
        is_main: this is the first process.
        text: of the previous epoch's bar, shown until the first report.
    """

    def __init__(self, epoch: int, total_epochs: int, steps: int, *, done: int, is_main: bool, text: str = "") -> None:
        self.title = f"epoch {epoch + 1}/{total_epochs}"
        self.log_title = f"Train: [{epoch}/{total_epochs}]"  # as in the official code, for scripts that parse it
        self.remaining_epochs = total_epochs - epoch - 1
        self.steps = steps
        self.bar = tqdm(
            file=ErrorsIgnored(sys.stderr),
            total=steps,
            initial=done,
            desc=self.title,
            bar_format=bar_format(text),
            leave=False,
            dynamic_ncols=True,
            disable=not shows_bars(is_main=is_main),
        )
        self.text = text

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Count a step that was started."""
        self.bar.update()

    def show(self, text: str) -> None:
        """Show the text right of the bar, which takes what is left of the line."""
        self.text = text
        self.bar.bar_format = bar_format(text)
        self.bar.refresh()

    def report(
        self,
        step: int,
        *,
        terms: Mapping[str, float],
        grad_norm: float,
        lr: float,
        rate: float | None,
        step_seconds: float | None,
        evaluation_seconds: float = 0.0,
    ) -> None:
        """Log the state after `step` steps of the epoch.

        Args:
            step: steps done.
            terms: means over the epoch so far of the loss, as "loss", and of its terms.
            grad_norm: gradient norm of the last step.
            lr: learning rate.
            rate: images per second since the last report; None before it is known.
            step_seconds: expected time per remaining step, from which the ETA follows; None before it is known.
            evaluation_seconds: expected time per remaining epoch between its last step and the next epoch's first.
        """
        eta = "?"
        if step_seconds is not None:
            remaining_steps = self.steps - step + self.remaining_epochs * self.steps
            eta = duration(remaining_steps * step_seconds + (self.remaining_epochs + 1) * evaluation_seconds)
        images = "? img/s" if rate is None else f"{rate:.0f} img/s" if rate >= 10 else f"{rate:.2g} img/s"
        losses = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        self.show(f"loss {terms['loss']:.4f}  {images}  ETA {eta}")
        logger.info(
            "%s[%d/%d]  %s  grad_norm %.3f  lr %.3e  %s  eta %s",
            *(self.log_title, step, self.steps, losses, grad_norm, lr, images, eta),
            extra=DETAIL,
        )


def bar_format(text: str) -> str:
    return f"{{desc}} {{n_fmt}}/{{total_fmt}} |{{bar}}| {text}"


def duration(seconds: float) -> str:
    """Return seconds as [hours:]minutes:seconds."""
    return tqdm.format_interval(round(seconds))


def with_bar(batches: Iterable[Batch], names: Iterable[str], *, is_main: bool) -> Iterable[Batch]:
    """Return the batches of an evaluation of models, by name, with a bar that shows how many are done."""
    options: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "disable": not shows_bars(is_main=is_main)}
    options |= {"desc": f"evaluating {' and '.join(names)}", "bar_format": bar_format("{remaining} left")}
    return tqdm(batches, file=ErrorsIgnored(sys.stderr), **options)

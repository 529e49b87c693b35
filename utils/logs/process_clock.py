"""Time since the start of this process, and where the seconds of a run's start went."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

IMPORT_TIME = time.monotonic()
START_TIME_FIELD = 19  # of /proc/PID/stat after the program's name, in clock ticks since the system's start
SHORTEST_SECONDS = 0.05  # of a part of the start that is shown


class StartClock:
    """Seconds of a run's start by part, for a line of the log.

    Args:
        before: seconds that have passed already, by part.
        clock: returns seconds.
    """

    def __init__(self, before: Mapping[str, float] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.parts = dict(before or {})
        self.clock = clock
        self.last = clock()

    def end(self, part: str) -> None:
        """Count the time since the last call as that of a part, which may come several times."""
        now = self.clock()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        shown = [f"{part} {seconds:.1f}" for part, seconds in self.parts.items() if seconds >= SHORTEST_SECONDS]
        return f"{sum(self.parts.values()):.1f} s: {', '.join(shown)}"


def process_seconds() -> float:
    """Return the seconds since this process was started; where only Linux could tell, since this module's import."""
    seconds = seconds_since_start_of(os.getpid())
    return time.monotonic() - IMPORT_TIME if seconds is None else seconds


def launch_seconds() -> dict[str, float]:
    """Return the seconds since the launcher's start, or this process's if it has none: until this process began, since.

    A launcher's later starts of the processes are not counted from its own start.
    """
    own, launcher = process_seconds(), None
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        launcher = seconds_since_start_of(os.getppid())
    return {"launcher": max(0.0, (launcher or own) - own), "imports": own}


def import_advice(package: ModuleType) -> str:
    """Return how a package is imported faster if Python compiles its modules at each start, else an empty string."""
    spec = package.__spec__
    if not sys.dont_write_bytecode or not (spec and spec.origin and spec.cached) or Path(spec.cached).exists():
        return ""
    folder = Path(spec.origin).parents[1]
    return (
        "imports are slow: Python compiles all modules at each start, since PYTHONDONTWRITEBYTECODE is set and "
        f"{folder} has none; unset it, or run once: python -m compileall -q -j 0 {shlex.quote(str(folder))}"
    )


def seconds_since_start_of(process: int) -> float | None:
    """Return the seconds since a process was started, or None where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError):
        return None

"""Time since the start of this process."""

import os
import time
from pathlib import Path

IMPORT_TIME = time.monotonic()
START_TIME_FIELD = 19  # of /proc/self/stat after the program's name, in clock ticks since the system's start


def process_seconds() -> float:
    """Return the seconds since this process was started; where only Linux could tell, since this module's import."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.monotonic() - IMPORT_TIME

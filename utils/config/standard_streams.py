"""Standard output and error that may be closed, full, or unable to encode a name."""

import contextlib
import io
import os
import sys
from pathlib import Path


def prepare_standard_streams() -> None:
    """Open standard streams that are closed, as with `>&-`, to nowhere, and let standard output print every name.

    Without the first, sys.stdout is None, and the next file to be opened, maybe a checkpoint, gets what C libraries
    print. Characters that the encoding lacks, such as bytes of names that are not UTF-8, become escapes, not errors;
    standard error escapes them already.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115, for the life of the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf = sys.stdout.encoding.lower().startswith("utf")
        if sys.stdout.errors == "strict" or (sys.stdout.errors == "surrogateescape" and not is_utf):
            sys.stdout.reconfigure(errors="backslashreplace")


def print_error(line: str) -> None:
    """Print to standard error, if it can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr)


def flush_standard_streams() -> None:
    """Flush standard output and error before a process ends.

    What cannot be written is dropped: Python would try it again at exit, and end with code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # full, without a reader, or closed
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)

"""Faults: each starts a run, injects itself at a random moment, and waits for the end of the run's processes.

`inject` of a fault returns what happened, in a few words for the table, or None if the run ended before; it raises
FindingError if the processes did not end as utils/README.md says.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.processes import Started, children_of, descendants, kill_all, send
from tests.faults.runs import Run, wait_while_running

END_SECONDS = 300  # generous: other programs may use the machine, too
IMPORT_SECONDS = 4.0
CHECKPOINT_BYTES = 2_400_000  # about; the small models' are not larger
DISK_BYTES = 64 * 2**20
SKIPPED = "skipped a checkpoint"  # in the log


class FindingError(Exception):
    """A run did not do what it promises."""


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: its name on the command line.
        title: its row of the table.
        inject: see the module's docstring.
        min_processes: that a run needs for it.
    """

    name: str
    title: str
    inject: Callable[[Run, random.Random], str | None]
    min_processes: int = 1


# Moments: each waits for one, and returns False if the run ended before.


def while_importing(_: Run, __: Started, rng: random.Random) -> bool:
    time.sleep(rng.uniform(0, IMPORT_SECONDS))
    return True


def wait_for_more(process: Started, rng: random.Random, count: Callable[[], int], *, most: int, pause: float) -> bool:
    """Wait until a count has grown by 1 to `most` + 1, and then up to `pause` seconds."""
    start = count() + rng.randint(0, most)
    reached = wait_while_running(process, lambda: count() > start)
    time.sleep(rng.uniform(0, pause))
    return reached


def while_training(run: Run, process: Started, rng: random.Random) -> bool:
    return wait_for_more(process, rng, run.step_lines, most=5, pause=0.3)


def while_saving(run: Run, process: Started, rng: random.Random) -> bool:
    for _ in range(rng.randint(1, 3)):
        if not wait_while_running(process, lambda: not any(run.folder.glob("ckpt_*.tmp"))):
            return False
        if not wait_while_running(process, lambda: any(run.folder.glob("ckpt_*.tmp"))):
            return False
    time.sleep(rng.uniform(0, 0.01))
    return True


def while_evaluating(run: Run, process: Started, rng: random.Random) -> bool:
    return wait_for_more(process, rng, run.ends_of_epochs, most=1, pause=0.5)


MOMENTS = {
    "importing": while_importing,
    "training": while_training,
    "saving": while_saving,
    "evaluating": while_evaluating,
}


def wait_for_end(run: Run, process: Started, allowed: set[int], *, text: str | None = None) -> int:
    """Return the exit code.

    Args:
        allowed: exit codes; torchrun's own is 1 whenever a process of it did not end with 0.
        text: printed since the start, in which a traceback is a finding; None: in a run of one process all of it.

    Raises:
        FindingError: another exit code, a traceback, or no end.
    """
    try:
        code = process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise FindingError(f"still running after {END_SECONDS} s") from None
    if code not in (allowed if run.processes == 1 else allowed | {1}):
        raise FindingError(f"exit code {code}: {run.printed()[-1500:]}")
    printed = run.printed() if text is None and run.processes == 1 else text or ""  # torchrun prints some of its own
    if "Traceback" in printed + run.log():
        raise FindingError(f"a traceback: {run.printed()[-3000:]}")
    return code


def interrupt(run: Run, rng: random.Random, *, number: int, moment: str, everyone: bool) -> str | None:
    """Send a signal to the first process, or to everyone, at a moment."""
    process = run.start(forked=moment != "importing")
    if not MOMENTS[moment](run, process, rng) or process.poll() is not None:
        wait_for_end(run, process, {0})
        return None
    pids = [process.pid, *(descendants(process.pid) if everyone else ())]
    if number != signal.SIGKILL:  # a group's signal does not reach loader workers, which have groups of their own
        groups = {process.pid, *(children_of(process.pid) if run.processes > 1 else ())}
        pids = [pid for pid in pids if group_of(pid) in groups]
    send(number, pids)
    # Before training has begun, a signal ends the process at once; Python's imports end with Ctrl-C's traceback.
    text = "" if (moment, number) == ("importing", signal.SIGINT) else None
    code = wait_for_end(run, process, {-number, 0, *((1, 130) if number == signal.SIGINT else ())}, text=text)
    if number == signal.SIGKILL:
        return "killed"
    return "ended at once" if code == -number else "stopped"


def kill_worker(run: Run, rng: random.Random) -> str | None:
    """Kill one of the processes that torchrun started, which ends the others."""
    process = run.start(forked=True)
    if not while_training(run, process, rng) or not (workers := children_of(process.pid)):
        wait_for_end(run, process, {0})
        return None
    send(signal.SIGKILL, [rng.choice(workers)])
    wait_for_end(run, process, {0})
    return "all processes ended"


def group_of(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


# Disks and standard output


def mount_small_disk(folder: Path) -> bool:
    """Mount a small file system over a run's empty folder; return False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "faults", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0


def fill(folder: Path, room: int) -> Path:
    """Fill a disk but for some bytes."""
    disk = os.statvfs(folder)
    filler = folder / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, disk.f_bavail * disk.f_frsize - room)))
    return filler


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill_disk(run: Run, rng: random.Random) -> str | None:
    """Fill the disk of the run folder at a random moment, and make room later, or after the run."""
    disk, room = run.folder.parent, rng.randrange(2 * CHECKPOINT_BYTES)
    if not disk.is_mount() and not mount_small_disk(disk):
        process = run.start(forked=True, before=partial(limit_file_size, room))
        return describe_end(wait_for_end(run, process, {0, 2}))
    process = run.start(forked=True)
    if not rng.choice((while_training, while_evaluating))(run, process, rng):
        wait_for_end(run, process, {0})
        return None
    filler = fill(disk, room)
    if rng.random() < 0.5:
        while_training(run, process, rng)
        filler.unlink()
    code = wait_for_end(run, process, {0, 2})
    filler.unlink(missing_ok=True)
    return describe_end(code)


def describe_end(code: int) -> str:
    return "ended with one line" if code else "went on"


def lose_stdout(run: Run, rng: random.Random) -> str | None:
    """Let standard output be full, closed, or a pipe whose reader leaves at a random moment."""
    way = rng.choice(("full", "closed", "left"))
    if way != "left":
        kind = {"stdout": Path("/dev/full")} if way == "full" else {"before": partial(os.close, 1)}
        wait_for_end(run, run.start(forked=way == "full", **kind), {0})  # type: ignore[arg-type]
        return "went on"
    run.output.mkdir(parents=True, exist_ok=True)
    pipe = run.output / "pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = run.start(forked=True, stdout=pipe)
    while_training(run, process, rng)
    os.close(reader)
    wait_for_end(run, process, {0})
    return "went on"


# Files and folders


def damage_newest(run: Run, rng: random.Random, *, damage: Callable[[Path, random.Random], None]) -> str | None:
    """Kill a run, damage its newest checkpoint, and let the run end."""
    if interrupt(run, rng, number=signal.SIGKILL, moment="training", everyone=True) is None:
        return None
    if (newest := run.newest()) is None:
        return None
    damage(newest, rng)
    count = run.log().count(SKIPPED)
    wait_for_end(run, run.start(forked=True), {0})
    return "the checkpoint was skipped" if run.log().count(SKIPPED) > count else "the damage is between its records"


def flip_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def tear(path: Path, rng: random.Random) -> None:
    """Cut a file short, or overwrite a page of it with zeros."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.5:
        del content[at:]
    else:
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    path.write_bytes(content)


def start_twice(run: Run, rng: random.Random) -> str | None:
    """Start a command twice, at almost the same time."""
    first = run.start(forked=True)
    time.sleep(rng.uniform(0, 1))
    second = run.start(forked=True)
    codes = [wait_for_end(run, process, {0, 2}) for process in (first, second)]
    if all(codes):
        raise FindingError(f"both were refused: {run.printed()[-3000:]}")
    # The lock waits for a run that is about to end.
    return "the second refused in one line" if any(codes) else "one after the other"


def signal_faults() -> list[Fault]:
    """Return the faults that are signals; what gets them, and the moment, differ."""
    faults = []
    for word, number, everyone in (
        ("kill", signal.SIGKILL, True),
        ("term", signal.SIGTERM, False),
        ("term-group", signal.SIGTERM, True),
        ("int", signal.SIGINT, True),
    ):
        to = "" if number == signal.SIGKILL else " to all processes" if everyone else " to the first process"
        for moment in MOMENTS:
            action = partial(interrupt, number=number, moment=moment, everyone=everyone)
            faults.append(Fault(f"{word}-{moment}", f"{signal.Signals(number).name}{to} while {moment}", action))
    return faults


FAULTS = {
    fault.name: fault
    for fault in (
        *signal_faults(),
        Fault("kill-worker", "SIGKILL to one of two processes", kill_worker, min_processes=2),
        Fault("disk", "the run folder's disk fills", fill_disk),
        Fault("stdout", "standard output full, closed or without a reader", lose_stdout),
        Fault("bit", "killed, and a bit flips in the newest checkpoint", partial(damage_newest, damage=flip_bit)),
        Fault(
            "torn",
            "killed, and a page of the newest checkpoint is lost, or its end",
            partial(damage_newest, damage=tear),
        ),
        Fault("two-starters", "the command is started twice at once", start_twice),
    )
}

"""environment.jsonl: versions, device and command line of each start of a run."""

import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from utils.distributed.process import Process
from utils.logs.output_dir import output_errors
from utils.logs.recorder import append_records

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "pillow", "simplejpeg", "opencv-python-headless")
GIT_SECONDS = 10


def record_environment(folder: Path, process: Process, *, epoch: int) -> None:
    """Add a line to <folder>/environment.jsonl, for a run that starts at or resumes from `epoch`. Main process only.

    Raises:
        OutputError: it cannot be written.
    """
    with output_errors(folder):
        append_records(folder / "environment.jsonl", [{"epoch": epoch, **environment(process)}])


def environment(process: Process) -> dict[str, Any]:
    """Return metadata of this machine and process, for JSON; None for what is unknown."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": commit(Path(__file__).parents[2]),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processes": process.num_processes,
        "machines": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "device": device_name(process.device),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if process.device.type == "cuda" else None,
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return models[0].split(":", 1)[1].strip() if models else platform.machine()


def describe_cores(info: Path = Path("/proc/cpuinfo"), system: Path = Path("/sys/devices/system/cpu")) -> str:
    """Return how many processors this process may use, and of how many physical cores they are if that is known.

    A vCPU of a virtual machine is often one of two threads of a physical core, which the machine need not show.
    """
    if not hasattr(os, "sched_getaffinity"):
        return f"{os.cpu_count()} CPUs"
    usable = os.sched_getaffinity(0)
    siblings = [system / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in usable]
    physical = len({path.read_text() for path in siblings}) if all(path.exists() for path in siblings) else 0
    is_virtual = info.exists() and re.search(r"\bhypervisor\b", info.read_text())
    if 0 < physical < len(usable):
        return f"{len(usable)} {'vCPUs' if is_virtual else 'hardware threads'} of {physical} physical cores"
    return f"{len(usable)} {'vCPUs' if is_virtual else 'physical cores' if physical else 'CPUs'}"


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(code: Path) -> str | None:
    """Return the commit of the code's working tree, with -dirty if it has changes; None if it is not a git checkout."""
    try:
        # An installed copy may lie in the working tree of another project, whose commit says nothing about it.
        git(code, "ls-files", "--error-unmatch", "main.py")
        return git(code, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()

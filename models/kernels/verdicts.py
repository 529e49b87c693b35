"""Verdicts of the self-test on disk: a later start on the same kind of machine does not test again.

The file is $XDG_CACHE_HOME/mlla/self_test.json, or that in ~/.cache. Its keys name GPU, driver, torch, Triton, the
source of the kernels, and Triton's cache, which holds the compiled kernels. A failure counts for the processes of one
launch only: the next start tests again. A file that is damaged or cannot be written is ignored.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Case = tuple[str, int, int, int]  # kernel, channels, head dim, rows of tokens

MOST_KEYS = 16  # the oldest are dropped
START_TIME = 19  # field of /proc/PID/stat, counted behind the name


def load(device: torch.device, dtype: torch.dtype) -> dict[Case, str]:
    """Return the verdicts on disk for a device and dtype: "" for a kernel that passed, or what is wrong with it."""
    key = describe(device)
    if not key or not triton_cache_dir().is_dir():  # deleted since: with the verdicts, compiling would be silent
        return {}
    try:
        found = {}
        for kernel, channels, head_dim, rows, dtype_name, reason, launch in read_file().get(key, []):
            if dtype_name == str(dtype) and (reason == "" or launch == current_launch() != ""):
                found[str(kernel), int(channels), int(head_dim), int(rows)] = str(reason)
    except (ValueError, TypeError):  # damaged
        return {}
    return found


def save(device: torch.device, dtype: torch.dtype, verdicts: Mapping[Case, str]) -> None:
    """Add verdicts to the file: those of kernels that passed, and in a launch of several processes also failures."""
    key, launch = describe(device), current_launch()
    verdicts = {case: reason for case, reason in verdicts.items() if launch or not reason}
    if not key or not verdicts:
        return
    table = read_file()
    known = table.pop(key, [])
    replaced = [[*case, str(dtype)] for case in verdicts]
    rows = [row for row in known if row[:5] not in replaced] if is_table(known) else []
    rows += [[*case, str(dtype), reason, launch if reason else ""] for case, reason in verdicts.items()]
    others = list(table.items())[1 - MOST_KEYS :]
    try:
        target = cache_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**dict(others), key: rows}, indent=1))
        temporary.replace(target)
    except (OSError, RuntimeError):  # a full or read-only disk, or no home
        return


def can_save(device: torch.device) -> bool:
    """Return whether processes can share verdicts on this device through the file."""
    try:
        folder = cache_file().parent
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return bool(describe(device)) and os.access(folder, os.W_OK)


def is_table(rows: object) -> bool:
    """Return whether these are rows as `save` writes them: case, dtype, reason, launch."""
    return isinstance(rows, list) and all(isinstance(row, list) and len(row) == 7 for row in rows)


def read_file() -> dict[str, Any]:
    """Return the content of the file; empty where there is none, or a damaged one."""
    try:
        table = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):
        return {}
    return table if isinstance(table, dict) else {}


def cache_file() -> Path:
    """Return the path of the file.

    Raises:
        RuntimeError: the user has no home.
    """
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "mlla" / "self_test.json"


@cache
def describe(device: torch.device) -> str:
    """Return what verdicts on a GPU depend on; an empty string for other devices, whose verdicts are not kept."""
    if device.type != "cuda":
        return ""
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    return ", ".join(
        (
            f"{torch.cuda.get_device_name(device)} ({major}.{minor})",
            f"driver {driver_version()}",
            f"torch {torch.__version__}",
            f"triton {triton.__version__}",
            f"kernels {hash_source()}",
            f"compiled in {triton_cache_dir()}",
        )
    )


def triton_cache_dir() -> Path:
    """Return the folder in which Triton keeps compiled kernels."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # noqa: PTH111, since Path's may raise
    return Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))  # noqa: PTH118


def fix_triton_cache_dir() -> None:
    """Keep Triton's folder for the whole run; else torch.compile names another, without what was compiled before."""
    folder = triton_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder))


def driver_version() -> str:
    """Return CUDA's version of the driver, and the driver's own where the system tells it."""
    cuda_version = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    try:
        first_line = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return str(cuda_version)
    return f"{cuda_version} {' '.join(first_line.split())}"


def source_files() -> list[Path]:
    """List the files on which the self-test's result depends: the kernels, and what `problems` imports beside them."""
    folder = Path(__file__).parent
    return [*sorted(folder.rglob("*.py")), folder.parent / "rope.py"]


def other_case(name: str) -> Case:
    """Return the case of a kernel "module:name" of another package, for one state of the files in its folder."""
    spec = find_spec(name.partition(":")[0])
    assert spec is not None
    assert spec.origin is not None
    return f"{name} {hash_source(sorted(Path(spec.origin).parent.glob('*.py')))}", 0, 0, 0


def hash_source(paths: Iterable[Path] | None = None) -> str:
    """Return a hash of files, by default those of the kernels here."""
    digest = hashlib.sha256()
    for path in source_files() if paths is None else paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def local_rank() -> int:
    """Return the rank of this process on its machine, from the launcher's variable."""
    return launcher_number("LOCAL_RANK", 0)


def num_local_processes() -> int:
    """Return the number of processes of this launch on its machine."""
    return launcher_number("LOCAL_WORLD_SIZE", 1)


def launcher_number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def current_launch() -> str:
    """Return what only the processes of this launch share, their parent's number and start; "" for a single process."""
    parent = os.getppid()
    try:
        start = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[START_TIME]
    except (OSError, IndexError):
        return ""
    return f"{parent} {start}" if num_local_processes() > 1 else ""

"""Encoded images in memory that all processes of a machine share, and the size of available memory."""

import mmap
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError

TOKEN_BYTES = 16
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class MemoryAddress(NamedTuple):
    """Location of a cache for other processes of this machine, and a token that identifies it."""

    pid: int
    descriptor: int
    token: bytes

    def open(self) -> int:
        return os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDWR)


class SharedCache:
    """Slots of fixed sizes in anonymous shared memory; the first process that reads an image fills its slot.

    Worker processes share it with any start method, other processes with `join`. The kernel frees the memory with the
    last process that uses it, also after a crash. It is not in /dev/shm, which is small in containers.

    Args:
        sizes: size of each slot in bytes (N,).

    Raises:
        DataError: the system has no such memory; Linux does.
    """

    def __init__(self, sizes: np.ndarray) -> None:
        if not hasattr(os, "memfd_create"):
            raise DataError(f"DATA.CACHE_MODE: {sys.platform} has no shared anonymous memory; set it to no")
        self.num_slots = len(sizes)
        # Layout: token, a flag per slot, slots.
        self.starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))) + TOKEN_BYTES + len(sizes)  # (N + 1,)
        self.address = MemoryAddress(os.getpid(), os.memfd_create("encoded-images"), os.urandom(TOKEN_BYTES))
        os.ftruncate(self.address.descriptor, int(self.starts[-1]))
        os.pwrite(self.address.descriptor, self.address.token, 0)
        self.memory = mmap.mmap(self.address.descriptor, int(self.starts[-1]))

    def get(self, slot: int) -> bytes | None:
        """Return the content of a slot, or None while it is empty."""
        if not self.memory[TOKEN_BYTES + slot]:
            return None
        return self.memory[self.starts[slot] : self.starts[slot + 1]]

    def put(self, slot: int, data: bytes) -> None:
        """Fill a slot. Two processes may do so at the same time with the same data."""
        self.memory[self.starts[slot] : self.starts[slot + 1]] = data
        self.memory[TOKEN_BYTES + slot] = 1  # last, when the data are complete

    def join(self, address: MemoryAddress) -> None:
        """Use the memory of another process's cache of the same sizes instead of this one's.

        Raises:
            OSError: the memory of that process cannot be opened.
        """
        descriptor = address.open()
        memory = mmap.mmap(descriptor, int(self.starts[-1]))
        if memory[:TOKEN_BYTES] != address.token:
            raise OSError(f"process {address.pid} is not the one that shares its cache")
        self.memory.close()
        os.close(self.address.descriptor)
        self.address = MemoryAddress(os.getpid(), descriptor, address.token)
        self.memory = memory

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "memory"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        descriptor = self.address.open()
        self.memory = mmap.mmap(descriptor, int(self.starts[-1]))
        os.close(descriptor)  # the mapping holds the memory


def machine() -> tuple[str, int]:
    """Return the kernel's boot ID and the PID namespace; processes with both in common can share memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/pid").stat().st_ino


def available_bytes() -> int:
    """Return the memory that is available on the machine or, if less, within the container's limit; Linux tells."""
    if not sys.platform.startswith("linux"):
        return sys.maxsize
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    left = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for limit, used in CGROUP_FILES:
        try:
            left.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such cgroup, or the limit is "max"
            continue
    return max(0, min(left))

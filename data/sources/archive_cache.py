"""Archives whose images stay in memory: how much that takes, and which processes share it."""

import os
from typing import Any

import torch

from data.sources.shared_cache import SharedCache, available_bytes, machine
from data.sources.zip_folder import ZipFolder


def cache_archives(archives: list[ZipFolder], mode: str, rank: int, num_processes: int) -> None:
    """Give each archive a cache: of this process's shard ("part"), or of all, which the machine's processes share.

    Raises:
        OSError: the machine has not the memory for it.
    """
    first, step = (rank, num_processes) if mode == "part" else (0, 1)
    needed = sum(archive.bytes_of(first, step) for archive in archives)
    if mode == "part":
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by the launcher: processes on this machine
    if needed > (available := available_bytes()):
        raise OSError(
            f"DATA.CACHE_MODE {mode!r}: the images would take {needed / 2**30:.1f} GiB of this machine's memory, "
            f"{available / 2**30:.1f} GiB are available; set --cache-mode {'no' if mode == 'part' else 'part, or no'}"
        )
    caches = [archive.use_cache(first, step) for archive in archives]
    if mode == "full" and num_processes > 1:
        share_on_machine(caches, num_processes)


def share_on_machine(caches: list[SharedCache], num_processes: int) -> None:
    """Let the processes of each machine use the caches of the first one there."""
    mine = (machine(), [cache.address for cache in caches])
    everyone: list[Any] = [None] * num_processes
    torch.distributed.all_gather_object(everyone, mine)
    addresses = next(addresses for where, addresses in everyone if where == mine[0])
    for cache, address in zip(caches, addresses, strict=True):
        if address.pid != os.getpid():
            cache.join(address)
    torch.distributed.barrier()  # none may end before all have joined

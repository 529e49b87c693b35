import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.sources import shared_cache
from data.sources.shared_cache import MemoryAddress, SharedCache, available_bytes, machine


def fill(cache: SharedCache, slot: int, data: bytes) -> None:
    cache.put(slot, data)


def join_and_fill(address: MemoryAddress, sizes: np.ndarray) -> None:
    other = SharedCache(sizes)
    other.join(address)
    assert other.get(0) == b"abc"
    other.put(2, b"xy")


def test_slots_are_empty_until_filled() -> None:
    cache = SharedCache(np.array([3, 0, 2]))
    assert [cache.get(slot) for slot in range(3)] == [None] * 3
    cache.put(1, b"")
    cache.put(2, b"xy")
    assert [cache.get(slot) for slot in range(3)] == [None, b"", b"xy"]


def test_worker_processes_share_the_cache() -> None:
    cache = SharedCache(np.array([3, 2]))
    process = multiprocessing.get_context("fork").Process(target=fill, args=(cache, 1, b"xy"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert cache.get(1) == b"xy"
    assert cache.get(0) is None


def test_other_processes_join_the_cache() -> None:
    sizes = np.array([3, 0, 2])
    cache = SharedCache(sizes)
    cache.put(0, b"abc")
    process = multiprocessing.get_context("fork").Process(target=join_and_fill, args=(cache.address, sizes))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert cache.get(2) == b"xy"


def test_memory_with_another_token_is_rejected() -> None:
    cache, other = SharedCache(np.array([3])), SharedCache(np.array([3]))
    with pytest.raises(OSError, match="not the one that shares its cache"):
        other.join(cache.address._replace(token=bytes(16)))


def test_machine_is_the_same_for_all_processes_of_a_machine() -> None:
    assert machine() == machine()
    assert machine()[1] == Path("/proc/self/ns/pid").stat().st_ino


def test_containers_have_less_memory_than_their_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_bytes()
    assert free > 1 << 20
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "current").write_text("3000\n")
    files = (str(tmp_path / "max"), str(tmp_path / "current"))
    monkeypatch.setattr(shared_cache, "CGROUP_FILES", ((str(tmp_path / "none"), str(tmp_path / "none")), files))
    assert available_bytes() == 2000
    (tmp_path / "max").write_text("max\n")
    assert available_bytes() > 1 << 20


def test_systems_without_shared_anonymous_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(DataError, match=r"CACHE_MODE: .* set it to no"):
        SharedCache(np.array([3]))

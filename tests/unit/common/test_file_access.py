"""Reads of a disk that hangs cost a few threads, however many ask for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from stagecoach import file_access
from stagecoach.file_access import BoundedReads

NUM_THREADS = 2


class HungDisk:
    """Where every read waits until the disk is back."""

    def __init__(self) -> None:
        self.back = threading.Event()
        self.num_reads = 0

    def read(self) -> str:
        self.num_reads += 1
        self.back.wait(30.0)
        return "read"


@pytest.fixture
def disk() -> Iterator[HungDisk]:
    disk = HungDisk()
    yield disk
    disk.back.set()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_access, "FILE_TIMEOUT_S", 0.05)


async def fail_in_time(reads: BoundedReads, disk: HungDisk, times: int) -> list[str]:
    results = await asyncio.gather(*(reads.read(disk.read, "a file") for _ in range(times)), return_exceptions=True)
    assert all(isinstance(result, TimeoutError) for result in results)
    return [str(result) for result in results]


async def test_reads_that_hang_keep_no_more_threads_than_there_are_for_them(disk: HungDisk) -> None:
    reads = BoundedReads(NUM_THREADS)
    first, second = await fail_in_time(reads, disk, 20), await fail_in_time(reads, disk, 20)
    assert disk.num_reads == NUM_THREADS
    assert sum("is its disk there" in text for text in first) == NUM_THREADS
    assert all("too many reads hang" in text for text in second)


async def test_a_thread_that_comes_back_is_there_for_the_next_read(
    disk: HungDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = BoundedReads(NUM_THREADS)
    await fail_in_time(reads, disk, NUM_THREADS)
    monkeypatch.setattr(file_access, "FILE_TIMEOUT_S", 10.0)
    waiting = [asyncio.create_task(reads.read(disk.read, "a file")) for _ in range(5)]
    disk.back.set()
    assert await asyncio.gather(*waiting) == ["read"] * 5


async def test_a_read_that_fails_or_that_nobody_waits_for_any_more_gives_its_thread_back(
    disk: HungDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_access, "FILE_TIMEOUT_S", 10.0)
    reads = BoundedReads(1)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            await reads.read(_fail, "a file")
    left = asyncio.create_task(reads.read(disk.read, "a file"))
    while not disk.num_reads:
        await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait([left])
    disk.back.set()
    assert await reads.read(disk.read, "a file") == "read"


def _fail() -> None:
    raise FileNotFoundError("it is gone")

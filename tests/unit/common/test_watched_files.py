"""Files on a disk that hangs: nobody waits for them, what was read before stays, and they are taken up again."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from stagecoach.errors import ConfigError
from stagecoach.file_access import read_in_time
from stagecoach.security import watched_files
from stagecoach.security.watched_files import WatchedFiles, check_for_ever, read_at_start


class Disk:
    """Reads a file as a mount does whose server can go away: until it is back, whoever reads waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_there = threading.Event()
        self.is_there.set()
        self.num_readers = 0

    def read(self) -> str:
        self.num_readers += 1
        self.is_there.wait()
        return self.path.read_text()


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    path = tmp_path / "file"
    path.write_text("first")
    return Disk(path)


@pytest.fixture
def files(disk: Disk) -> WatchedFiles[str]:
    return WatchedFiles([disk.path], disk.read, "tls_cert", timeout_s=0.02)


async def look_until(files: WatchedFiles[str], changed: bool) -> None:
    async with asyncio.timeout(10):
        while await files.look() != changed:
            await asyncio.sleep(0.001)


async def test_a_disk_that_hangs_is_reported_once_and_what_was_read_stays(disk: Disk, files: WatchedFiles[str]) -> None:
    disk.is_there.clear()
    disk.path.write_text("second, longer")
    with pytest.raises(ConfigError, match=r"file could not be read in 0.02 s") as caught:
        await files.look()
    assert caught.value.field == "tls_cert"
    for _ in range(100):
        assert not await files.look()
    assert files.content == "first"
    disk.is_there.set()
    await look_until(files, True)
    assert files.content == "second, longer"


async def test_it_is_tried_again_ever_more_rarely_and_by_few_threads(
    disk: Disk, files: WatchedFiles[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_files, "MAX_HANGING_THREADS", 3)
    before = disk.num_readers
    disk.is_there.clear()
    disk.path.write_text("second, longer")
    with pytest.raises(ConfigError):
        await files.look()
    begin = time.monotonic()
    while time.monotonic() - begin < 0.3:  # after 0.02, 0.04, 0.08 s, were there no limit
        await files.look()
        await asyncio.sleep(0.001)
    assert disk.num_readers - before == 3
    disk.is_there.set()
    await look_until(files, True)


async def test_files_of_another_mount_are_read_though_who_waits_for_the_old_one_still_does(
    disk: Disk, files: WatchedFiles[str]
) -> None:
    old = disk.is_there
    old.clear()
    disk.path.write_text("second, longer")
    with pytest.raises(ConfigError):
        await files.look()
    disk.is_there = threading.Event()
    disk.is_there.set()
    await look_until(files, True)
    assert files.content == "second, longer"
    old.set()  # what the late reader finds is nobody's any more
    disk.path.write_text("third, and longer still")
    await look_until(files, True)
    assert files.content == "third, and longer still"


async def test_the_event_loop_goes_on_while_a_disk_hangs(disk: Disk) -> None:
    files = WatchedFiles([disk.path], disk.read, "tls_cert", timeout_s=0.5)
    disk.is_there.clear()
    disk.path.write_text("second, longer")
    looking = asyncio.create_task(files.look())
    turns = 0
    while not looking.done():
        await asyncio.sleep(0)
        turns += 1
    disk.is_there.set()
    assert turns > 1000
    assert isinstance(looking.exception(), ConfigError)


async def test_what_hangs_at_the_start_is_an_error_with_the_file(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagecoach.file_access.FILE_TIMEOUT_S", 0.02)
    disk.is_there.clear()
    with pytest.raises(ConfigError, match=f"api_keys: {disk.path} could not be read") as caught:
        await read_at_start(disk.read, "api_keys", disk.path)
    assert caught.value.field == "api_keys"
    disk.is_there.set()


async def test_what_reading_raises_comes_through(disk: Disk) -> None:
    disk.path.unlink()
    with pytest.raises(FileNotFoundError):
        await read_in_time(disk.read, "it")


async def test_a_time_limit_of_the_disk_itself_is_not_taken_for_ours() -> None:
    def read() -> None:
        raise TimeoutError("the server has not answered")

    with pytest.raises(TimeoutError, match="the server has not answered"):
        await read_in_time(read, "it")


async def test_a_look_that_fails_as_nobody_foresaw_is_not_the_last_one(monkeypatch):
    monkeypatch.setattr(watched_files, "CHECK_INTERVAL_S", 0.0)
    looked = asyncio.Event()
    errors = [RuntimeError("can't start new thread"), MemoryError()]

    async def check():
        if errors:
            raise errors.pop()
        looked.set()

    watching = asyncio.create_task(check_for_ever(check))
    async with asyncio.timeout(5.0):
        await looked.wait()
    watching.cancel()

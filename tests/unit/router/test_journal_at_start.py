"""A router that starts while its journal's disk is full, broken or hung serves, and journals again when it works."""

from __future__ import annotations

import asyncio
import errno
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from stagecoach.errors import ConfigError
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.durability import journal as journal_module
from stagecoach_router.durability import journal_store
from stagecoach_router.durability.journal import Journal
from stagecoach_router.durability.journal_store import Begin, End, JournalStore, Token
from stagecoach_router.requests.request import Request
from stagecoach_router.sampling.outputs import Sampled

TIMEOUT_S = 10.0


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(journal_module, "RETRY_INTERVAL_S", 0.001)
    return tmp_path / "journal.sqlite"


@contextmanager
def full_disk(max_file_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write(path: Path, name: str, *, model: str = "f00d", finished_s: float | None = None) -> None:
    """A request that a former router left, with one token."""
    key = ("", name)
    with closing(JournalStore(path)) as store:
        store.check_model(model)
        request = Request(name, (1,), SamplingParams(max_tokens=9, seed=1))
        store.apply([Begin(key, b"digest", request), Token(key, 0, 0, Sampled(7, None, ()))])
        if finished_s is not None:
            store.apply([End(key, finished_s)])


def left(path: Path) -> list[str]:
    with closing(JournalStore(path)) as store:
        return [each.key[1] for each in store.load()]


async def started(path: Path) -> tuple[Journal, list[str]]:
    journal = Journal(path)
    await journal.open()
    return journal, [each.key[1] for each in await journal.load("f00d")]


async def until_it_works(caplog: pytest.LogCaptureFixture) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while "outlive this process again" not in caplog.text:
            await asyncio.sleep(0.001)


async def test_a_new_journal_on_a_full_disk_is_begun_when_there_is_room(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with full_disk(0):
        journal, names = await started(path)
        assert names == []
    await until_it_works(caplog)
    await journal.close()
    assert left(path) == []
    assert "delete" not in caplog.text
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_what_is_in_the_file_goes_on_although_the_disk_is_full(path: Path) -> None:
    """Old requests are to be deleted, and cannot; they are not gone on with."""
    write(path, "old", finished_s=1.0)
    write(path, "running")
    with full_disk(0):
        journal, names = await started(path)
        assert names == ["running"]
        await journal.close()


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def io_error() -> sqlite3.Error:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
    return error


@pytest.mark.parametrize(
    "error", [io_error(), OSError(errno.EROFS, "read-only"), OSError(errno.EIO, "broken")], ids=str
)
@pytest.mark.parametrize("where", ["_prepare", "load", "_identities"])
async def test_a_disk_that_fails_as_the_file_is_read_is_not_the_files_fault(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, where: str
) -> None:
    """What was in it is gone on with by nobody: its callers may have begun it again meanwhile."""
    write(path, "unread")
    with monkeypatch.context() as disk:
        disk.setattr(JournalStore, where, failing(error))
        journal, names = await started(path)
        assert names == []
    await until_it_works(caplog)
    await journal.close()
    assert left(path) == []


async def test_a_directory_that_is_not_there_is_still_an_error_of_the_settings(path: Path) -> None:
    with pytest.raises(ConfigError):
        await Journal(path / "journal").open()


async def test_the_file_of_another_model_that_could_not_be_read_at_first_keeps_its_requests(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, "theirs", model="another")
    tried = asyncio.Event()
    loop = asyncio.get_running_loop()
    check_model = JournalStore.check_model

    def check(store: JournalStore, fingerprint: str) -> None:
        loop.call_soon_threadsafe(tried.set)
        check_model(store, fingerprint)

    monkeypatch.setattr(JournalStore, "check_model", check)
    with monkeypatch.context() as disk:
        disk.setattr(JournalStore, "_prepare", failing(io_error()))
        journal, _ = await started(path)
    async with asyncio.timeout(TIMEOUT_S):
        await tried.wait()
    await journal.close()
    assert left(path) == ["theirs"]


async def test_a_disk_that_hangs_at_the_start_is_not_waited_for_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was opened too late is let go, or the file would be in use for every later attempt."""
    write(path, "unread")
    monkeypatch.setattr(journal_module, "MAX_START_S", 0.01)
    works = threading.Event()
    prepare = journal_store.make_private

    def hang(path: Path) -> None:
        works.wait(TIMEOUT_S)
        prepare(path)

    monkeypatch.setattr(journal_store, "make_private", hang)
    journal, names = await started(path)
    assert names == []
    assert "not answered in" in caplog.text
    works.set()
    await until_it_works(caplog)
    await journal.close()
    assert left(path) == []

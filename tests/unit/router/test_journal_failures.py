"""A disk that fails costs the journal and no answer; what is in the file then is never gone on with, nor half of it."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagecoach.errors import ConfigError
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.durability import journal as journal_module
from stagecoach_router.durability import journal_store
from stagecoach_router.durability.journal import Journal
from stagecoach_router.durability.journal_store import Begin, End, JournalStore, Token
from stagecoach_router.requests.completion import FinishReason, OutputDelta
from stagecoach_router.requests.output_stream import OutputReader
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled

TIMEOUT_S = 10.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@contextmanager
def full_disk(path: Path, spare_bytes: int = 6000) -> Iterator[None]:
    """Writes fail, in their middle, where they would make a file longer than the journal's log and so much."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.with_name(path.name + "-wal").stat().st_size + spare_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def opened(path: Path) -> Journal:
    journal = Journal(path)
    await journal.open()
    await journal.load("f00d")
    return journal


def begun(journal: Journal, name: str, num_prompt: int = 2) -> RequestState:
    request = Request(name, (1,) * num_prompt, SamplingParams(max_tokens=9, seed=1))
    state = RequestState(request, key=("", name), digest=b"digest")
    nothing_yet: Any = SimpleNamespace(num_tokens=0)
    state.completions.append(nothing_yet)
    journal.begin(state)
    state.on_end = lambda error: journal.end(state.key) if error is None else journal.forget(state.key)
    return state


def put(state: RequestState, token_id: int, *, last: bool = False) -> None:
    reason = FinishReason.LENGTH if last else None
    state.put(OutputDelta(0, "x", token_id, Sampled(token_id, None, ()), reason))


async def read(state: RequestState, last: int) -> list[int]:
    """All tokens up to the one that is `last`."""
    reader = OutputReader(state)
    tokens: list[int] = []
    async with asyncio.timeout(TIMEOUT_S):
        while last not in tokens:
            tokens += [delta.token_id for delta in await reader.read()]
    return tokens


def left(path: Path) -> dict[str, list[int]]:
    """The requests that a router would find, with their tokens."""
    with closing(JournalStore(path)) as store:
        return {each.key[1]: [sampled.token_id for sampled in each.past[0]] for each in store.load()}


def is_there(path: Path) -> bool:
    return path.exists()


async def until_gone(path: Path) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while is_there(path):
            await asyncio.sleep(0.001)


async def test_what_a_full_disk_left_in_the_file_is_not_gone_on_with(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither is a finished request computed again, nor another from fewer tokens than its caller has."""
    journal = await opened(path)
    running, finishing = begun(journal, "running"), begun(journal, "finishing")
    put(running, 1)
    assert await read(running, 1) == [1]
    with full_disk(path):
        begun(journal, "large", num_prompt=100_000)
        put(running, 2)
        put(finishing, 3, last=True)
        assert await read(running, 2) == [1, 2]
        assert await read(finishing, 3) == [3]
        assert finishing.ended
        await until_gone(path)  # a kill from now on finds nothing
    await journal.close()
    assert left(path) == {}
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_when_there_is_room_again_new_requests_are_written_and_those_that_ran_are_not(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_INTERVAL_S", 0.001)
    journal = await opened(path)
    before = begun(journal, "before")
    with full_disk(path, spare_bytes=0):
        put(before, 1)
        assert await read(before, 1) == [1]
        meanwhile = begun(journal, "meanwhile")
        put(meanwhile, 2)
        assert await read(meanwhile, 2) == [2]
    async with asyncio.timeout(TIMEOUT_S):
        while "outlive this process again" not in caplog.text:
            await asyncio.sleep(0.001)
    after = begun(journal, "after")
    for state in (before, meanwhile, after):
        put(state, 4)
        await read(state, 4)
    before.fail(ConfigError("whatever"))
    await journal.close()
    assert left(path) == {"after": [4]}
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_a_disk_that_fails_as_the_journal_closes_leaves_nothing_that_no_longer_holds(path: Path) -> None:
    journal = await opened(path)
    state = begun(journal, "r")
    put(state, 1)
    assert await read(state, 1) == [1]
    with full_disk(path, spare_bytes=0):
        put(state, 2, last=True)
        await journal.close()
        assert await read(state, 2) == [1, 2]
    assert not is_there(path)
    assert left(path) == {}


def apply_in_batches(store: JournalStore, tokens: list[Token]) -> None:
    """Such that the log always has room for one."""
    for first in range(0, len(tokens), 1000):
        store.apply(tokens[first : first + 1000])


def test_a_log_that_cannot_be_moved_into_the_database_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself tries it after a commit, and keeps to itself that it failed."""
    monkeypatch.setattr(journal_store, "MAX_LOG_BYTES", 200_000)
    key = ("", "r")
    tokens = [Token(key, 0, position, Sampled(7, None, ())) for position in range(40_000)]
    store = JournalStore(path)
    store.apply([Begin(key, b"digest", Request("r", (1,), SamplingParams(max_tokens=9, seed=1))), *tokens[:20_000]])
    assert path.with_name(path.name + "-wal").stat().st_size == 0, "moved"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        with pytest.raises(sqlite3.Error):
            apply_in_batches(store, tokens[20_000:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        store.close()


def test_another_journal_that_has_taken_the_place_of_ours_is_left_alone(path: Path) -> None:
    ours = JournalStore(path)
    path.rename(path.with_suffix(".old"))
    path.with_name(path.name + "-wal").rename(path.with_name("old-wal"))
    key = ("", "theirs")
    theirs = JournalStore(path)
    theirs.apply([Begin(key, b"digest", Request("theirs", (1,), SamplingParams(max_tokens=9, seed=1))), End(key, 1.0)])
    with pytest.raises(ConfigError, match="another journal now"):
        theirs.begin_anew(ours.identity)
    theirs.begin_anew(theirs.identity)  # where ours could not be deleted
    assert theirs.load() == []
    theirs.close()
    ours.discard()
    assert path.exists()

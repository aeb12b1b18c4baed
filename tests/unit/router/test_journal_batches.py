"""What is told to the journal is in the file before anyone reads it, and nothing after it was closed."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagecoach.errors import Cancelled, InternalError
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.durability.journal import Journal
from stagecoach_router.durability.journal_store import JournalStore
from stagecoach_router.requests.completion import FinishReason, OutputDelta
from stagecoach_router.requests.output_stream import OutputReader
from stagecoach_router.requests.request import CutShort, Request
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled

REQUEST = Request("r", (1, 2), SamplingParams(max_tokens=9, seed=1))
KEY = ("", "r")


def accepted_request() -> RequestState:
    state = RequestState(REQUEST, key=KEY, digest=b"digest")
    nothing_yet: Any = SimpleNamespace(num_tokens=0)
    state.completions.append(nothing_yet)
    return state


def delta(token_id: int, *, last: bool = False) -> OutputDelta:
    return OutputDelta(0, "x", token_id, Sampled(token_id, None, ()), FinishReason.LENGTH if last else None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


async def opened(path: Path) -> Journal:
    journal = Journal(path)
    await journal.open()
    await journal.load("f00d")
    return journal


async def tokens_left(path: Path) -> list[list[int]]:
    """Of every request in the file, its first completion's."""
    journal = Journal(path)
    await journal.open()
    left = await journal.load("f00d")
    await journal.close()
    return [[sampled.token_id for sampled in entry.past[0]] for entry in left]


async def test_a_token_is_in_the_file_when_it_is_read(path: Path) -> None:
    journal, state = await opened(path), accepted_request()
    journal.begin(state)
    reader = OutputReader(state)
    seen: list[int] = []
    for token_id in range(20):
        state.put(delta(token_id))
    while len(seen) < 20:
        seen += [each.token_id for each in await reader.read()]
        assert journal._store is not None
        [entry] = await journal._in_thread(journal._store.load)
        assert [sampled.token_id for sampled in entry.past[0]][: len(seen)] == seen
    await journal.close()
    assert await tokens_left(path) == [seen]


async def test_what_waits_is_written_in_one_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    apply = JournalStore.apply
    monkeypatch.setattr(JournalStore, "apply", lambda self, entries: (sizes.append(len(entries)), apply(self, entries)))
    journal, state = await opened(path), accepted_request()
    journal.begin(state)
    for token_id in range(50):
        state.put(delta(token_id))
    await journal.close()
    assert sum(sizes) == 51
    assert len(sizes) <= 2


async def test_after_it_was_closed_nothing_is_written_nor_shown(path: Path) -> None:
    journal, state = await opened(path), accepted_request()
    journal.begin(state)
    state.put(delta(1))
    closing = asyncio.create_task(journal.close())
    await asyncio.sleep(0)
    state.put(delta(2, last=True))
    journal.end(KEY)
    journal.forget(KEY)
    await closing
    reader = OutputReader(state)
    assert [each.token_id for each in await reader.read()] == [1]
    assert not state.ended
    assert await tokens_left(path) == [[1]]


async def test_an_end_without_a_token_is_read_after_the_tokens_and_is_in_the_file(path: Path) -> None:
    journal = await opened(path)
    state = accepted_request()
    state.request = replace(REQUEST, names_limit=False)
    journal.begin(state)
    state.put(delta(1))
    state.put(delta(2))
    state.completions[0].num_tokens = 2
    state.put(OutputDelta(0, "", None, None, FinishReason.LENGTH))
    assert state.read_from(0) == [], "nothing is in the file yet"
    while not state.ended:
        await state.wait()
    assert [each.token_id for each in state.read_from(0)] == [1, 2, None]
    await journal.close()
    journal = await opened(path)
    await journal.close()
    store = JournalStore(path)
    [entry] = store.load()
    store.close()
    assert entry.request.cut_short == (CutShort(0, 2, with_token=False),)
    assert [sampled.token_id for sampled in entry.past[0]] == [1, 2]


@pytest.mark.parametrize(("num_tokens", "ends"), [(5, (CutShort(0, 5, with_token=True),)), (9, ())])
async def test_an_end_at_a_limit_that_came_down_is_in_the_file_with_its_token(
    path: Path, num_tokens: int, ends: tuple[CutShort, ...]
) -> None:
    """One at the limit that it began with is found by a replay of its tokens."""
    journal, state = await opened(path), accepted_request()
    state.request = replace(REQUEST, names_limit=False)
    journal.begin(state)
    for token_id in range(num_tokens):
        state.completions[0].num_tokens += 1
        state.put(delta(token_id, last=token_id == num_tokens - 1))
    await journal.close()
    store = JournalStore(path)
    [entry] = store.load()
    store.close()
    assert entry.request.cut_short == ends
    assert len(entry.past[0]) == num_tokens


def fail(*arguments: object) -> None:
    raise sqlite3.OperationalError("disk I/O error")


async def test_a_disk_that_fails_when_the_journal_is_closed_fails_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal, state = await opened(path), accepted_request()
    journal.begin(state)
    state.put(delta(1))
    monkeypatch.setattr(JournalStore, "close", fail)
    await journal.close()
    assert [each.token_id for each in await OutputReader(state).read()] == [1]
    assert "disk I/O error" in caplog.text


async def test_a_disk_that_fails_twice_holds_no_answer_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal, state = await opened(path), accepted_request()
    monkeypatch.setattr(JournalStore, "apply", fail)
    monkeypatch.setattr(JournalStore, "close", fail)
    journal.begin(state)
    for token_id in range(3):  # the first of them is being written when the others come
        state.put(delta(token_id, last=token_id == 2))
        await asyncio.sleep(0)
    reader = OutputReader(state)
    async with asyncio.timeout(10):
        seen: list[int] = []
        while deltas := await reader.read():
            seen += [each.token_id for each in deltas]
    assert seen == [0, 1, 2]
    await journal.close()
    assert caplog.text.count("will not outlive") == 1


async def test_answers_are_shown_before_a_failed_disk_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, state = await opened(path), accepted_request()
    num_readable: list[int] = []
    monkeypatch.setattr(JournalStore, "apply", fail)
    monkeypatch.setattr(JournalStore, "discard", lambda self: num_readable.append(len(state.read_from(0))))
    journal.begin(state)
    state.put(delta(1))
    await journal.close()
    assert num_readable == [1]


async def test_a_request_that_cannot_be_shown_fails_and_the_others_go_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal's task would have ended with it, and with that every answer."""
    journal = await opened(path)
    broken, good = accepted_request(), accepted_request()
    good.key = ("", "good")

    def show(num_deltas: int) -> None:
        raise ZeroDivisionError("a bug")

    def cannot_end(error: object) -> None:
        raise ValueError("another bug")

    monkeypatch.setattr(broken, "show", show)
    broken.on_end = cannot_end
    for state in (broken, good):
        journal.begin(state)
        state.put(delta(1))
    async with asyncio.timeout(10):
        assert [each.token_id for each in await OutputReader(good).read()] == [1]
        with pytest.raises(InternalError, match="a bug"):
            await OutputReader(broken).read()
        good.put(delta(2))
        assert [each.token_id for each in await OutputReader(good, (1,)).read()] == [2]
    assert "Traceback" in caplog.text
    await journal.close()


async def test_a_disk_that_hangs_holds_no_answer_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    comes_back = threading.Event()
    journal, state = await opened(path), accepted_request()
    monkeypatch.setattr("stagecoach_router.durability.journal.MAX_WRITE_S", 0.05)
    monkeypatch.setattr(JournalStore, "apply", lambda *arguments: comes_back.wait())
    try:
        journal.begin(state)
        state.put(delta(1))
        reader = OutputReader(state)
        async with asyncio.timeout(10):
            assert [each.token_id for each in await reader.read()] == [1]
            state.put(delta(2))
            assert [each.token_id for each in await reader.read()] == [2]
            await journal.close()
    finally:
        comes_back.set()
    assert "has not answered in 0.05 s: requests will not outlive this process" in caplog.text


async def test_a_token_that_comes_after_its_request_failed_is_not_left_over(path: Path) -> None:
    journal, state = await opened(path), accepted_request()
    journal.begin(state)
    state.put(delta(1))
    state.fail(Cancelled("gone"))
    journal.forget(KEY)
    state.put(delta(2))  # it was on its way
    await journal.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM tokens").fetchone() == (0,)
    db.close()


def take_away(path: Path, gone: str) -> None:
    if gone == "moved":
        path.rename(path.with_suffix(".old"))
    elif gone == "without its log":
        path.with_name(path.name + "-wal").unlink()
    else:
        path.unlink()
    if gone == "replaced":
        path.touch()


@pytest.mark.parametrize("gone", ["deleted", "moved", "replaced", "without its log"])
async def test_a_file_that_is_no_longer_there_is_said_and_holds_no_answer_back(
    path: Path, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    """Without that, everything would go on being written into a file that no later process finds."""
    journal = await opened(path)
    state = accepted_request()
    journal.begin(state)
    reader = OutputReader(state)
    state.put(delta(1))
    assert [each.token_id for each in await reader.read()] == [1]
    take_away(path, gone)
    for token_id in (2, 3):
        state.put(delta(token_id))
        async with asyncio.timeout(10):
            assert [each.token_id for each in await reader.read()] == [token_id]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "requests will not outlive this process" in caplog.text
    await journal.close()

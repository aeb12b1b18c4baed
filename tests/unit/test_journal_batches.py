"""What is told to the journal is in the file before anyone reads it, and nothing after it was closed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from stagecoach.sampling import SamplingParams
from stagecoach_router.completion import FinishReason, Piece
from stagecoach_router.generation import Generation
from stagecoach_router.idempotency import Accepted
from stagecoach_router.journal import Journal
from stagecoach_router.outputs import Sampled
from stagecoach_router.request import Request

REQUEST = Request("r", (1, 2), SamplingParams(max_tokens=9, seed=1))
KEY = ("", "r")


class Counted:
    """Of a run, what the journal looks at."""

    def __init__(self) -> None:
        self.completion = self
        self.num_tokens = 0


def accepted_request() -> Accepted:
    generation = Generation(REQUEST)
    run: Any = Counted()
    generation.runs.append(run)
    return Accepted(KEY, b"digest", generation, 0.0)


def piece(token_id: int, *, last: bool = False) -> Piece:
    return Piece(0, "x", token_id, Sampled(token_id, None, ()), FinishReason.LENGTH if last else None)


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
    journal, accepted = await opened(path), accepted_request()
    journal.begin(accepted)
    reader = accepted.generation.pieces.reader()
    seen: list[int] = []
    for token_id in range(20):
        accepted.generation.pieces.put(piece(token_id))
    while len(seen) < 20:
        seen += [each.token_id for each in await reader.read()]
        assert journal._store is not None
        [entry] = await journal._in_thread(journal._store.load)
        assert [sampled.token_id for sampled in entry.past[0]][: len(seen)] == seen
    await journal.close()
    assert await tokens_left(path) == [seen]


async def test_what_waits_is_written_in_one_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stagecoach_router.journal_store import JournalStore

    sizes: list[int] = []
    apply = JournalStore.apply
    monkeypatch.setattr(JournalStore, "apply", lambda self, entries: (sizes.append(len(entries)), apply(self, entries)))
    journal, accepted = await opened(path), accepted_request()
    journal.begin(accepted)
    for token_id in range(50):
        accepted.generation.pieces.put(piece(token_id))
    await journal.close()
    assert sum(sizes) == 51
    assert len(sizes) <= 2


async def test_after_it_was_closed_nothing_is_written_nor_shown(path: Path) -> None:
    journal, accepted = await opened(path), accepted_request()
    journal.begin(accepted)
    accepted.generation.pieces.put(piece(1))
    closing = asyncio.create_task(journal.close())
    await asyncio.sleep(0)
    accepted.generation.pieces.put(piece(2, last=True))
    journal.end(KEY)
    journal.forget(KEY)
    await closing
    reader = accepted.generation.pieces.reader()
    assert [each.token_id for each in await reader.read()] == [1]
    assert not accepted.generation.pieces.ended
    assert await tokens_left(path) == [[1]]

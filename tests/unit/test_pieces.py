"""The pieces of one request reach its one reader in order, all that wait at a time, and then the error."""

from __future__ import annotations

import asyncio

import pytest

from stagecoach.errors import Unavailable
from stagecoach_router.completion import Piece
from stagecoach_router.outputs import Sampled
from stagecoach_router.pieces import Pieces


def piece(token_id: int) -> Piece:
    return Piece(0, "x", token_id, Sampled(token_id, None, ()), None)


async def test_what_waits_is_read_at_once_and_in_order() -> None:
    pieces = Pieces()
    for token_id in range(3):
        pieces.put(piece(token_id))
    assert len(pieces) == 3
    assert [each.token_id for each in await pieces.read()] == [0, 1, 2]
    assert len(pieces) == 0


async def test_a_reader_that_waits_is_woken_by_each_piece() -> None:
    pieces = Pieces()
    for token_id in range(3):
        reading = asyncio.create_task(pieces.read())
        await asyncio.sleep(0)
        assert not reading.done()
        pieces.put(piece(token_id))
        assert [each.token_id for each in await reading] == [token_id]


async def test_an_error_comes_after_what_was_put_before_it() -> None:
    pieces = Pieces()
    pieces.put(piece(1))
    pieces.fail(Unavailable("lost"))
    assert len(await pieces.read()) == 1
    for _ in range(2):
        with pytest.raises(Unavailable, match="lost"):
            await pieces.read()


async def test_an_error_wakes_a_reader_that_waits() -> None:
    pieces = Pieces()
    reading = asyncio.create_task(pieces.read())
    await asyncio.sleep(0)
    pieces.fail(Unavailable("lost"))
    with pytest.raises(Unavailable):
        await reading


async def test_a_reader_that_was_cancelled_loses_nothing() -> None:
    pieces = Pieces()
    reading = asyncio.create_task(pieces.read())
    await asyncio.sleep(0)
    reading.cancel()
    pieces.put(piece(7))
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert [each.token_id for each in await pieces.read()] == [7]

"""What is begun together ends together."""

from __future__ import annotations

import asyncio

import pytest

from stagecoach.errors import Unavailable
from stagecoach.process.together import together


async def test_results_come_in_order():
    async def after(turns, value):
        for _ in range(turns):
            await asyncio.sleep(0)
        return value

    assert await together(after(3 - number, number) for number in range(3)) == [0, 1, 2]


async def test_the_first_error_ends_the_others_and_is_raised_as_it_is():
    ended = []

    async def fail():
        await asyncio.sleep(0)
        raise Unavailable("first")

    async def go_on():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    with pytest.raises(Unavailable, match="first"):
        await together([go_on(), fail(), go_on()])
    assert ended == [True, True]


async def test_who_is_cancelled_ends_them():
    ended = []

    async def go_on():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    waiting = asyncio.create_task(together([go_on(), go_on()]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended == [True, True]

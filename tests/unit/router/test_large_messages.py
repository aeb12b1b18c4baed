"""Large requests are looked at one at a time, in turns of their callers, and only so much of them waits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stagecoach.errors import Overloaded
from stagecoach_router.frontend.large_messages import MAX_BYTES_ON_LOOP, LargeMessages
from stagecoach_router.tenants.caller import Caller
from tests.unit.router.anyone import ANYONE

TIMEOUT_S = 10.0
LARGE = MAX_BYTES_ON_LOOP + 1
HOG, ANN = Caller("hog", ANYONE.tenant), Caller("ann", ANYONE.tenant)


class Work:
    """Takes until it may end; notes what it was given."""

    def __init__(self) -> None:
        self.began, self.may_end, self.done = threading.Event(), threading.Event(), ""

    def __call__(self, message: str) -> threading.Thread:
        self.began.set()
        assert self.may_end.wait(TIMEOUT_S)
        self.done += message
        return threading.current_thread()


async def test_a_small_message_does_not_wait_and_a_large_one_is_looked_at_beside_the_loop() -> None:
    large, work = LargeMessages(), Work()
    work.may_end.set()
    assert await large.read(work, "s", MAX_BYTES_ON_LOOP, ANN) is threading.main_thread()
    assert await large.read(work, "l", LARGE, ANN) is not threading.main_thread()


async def test_who_sends_many_keeps_nobody_else_waiting() -> None:
    large, work = LargeMessages(), Work()
    tasks = [asyncio.create_task(large.read(work, "h", LARGE, HOG)) for _ in range(50)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(large.read(work, "a", LARGE, ANN)))
    await asyncio.to_thread(work.began.wait, TIMEOUT_S)
    work.may_end.set()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*tasks)
    assert "a" in work.done[:3]
    assert len(work.done) == 51


async def test_more_than_may_wait_is_refused() -> None:
    large, work = LargeMessages(max_bytes=8 * LARGE), Work()
    tasks = [asyncio.create_task(large.read(work, "h", LARGE, HOG)) for _ in range(7)]  # eight ninths
    await asyncio.to_thread(work.began.wait, TIMEOUT_S)
    with pytest.raises(Overloaded, match="bytes of requests that may wait to be read are taken"):
        await large.read(work, "h", LARGE, HOG)
    work.may_end.set()
    await asyncio.gather(*tasks)

"""A call's place is free when its task is gone."""

from __future__ import annotations

import asyncio
import threading
import weakref

import pytest

from stagecoach.errors import Overloaded
from stagecoach_router.frontend.open_calls import OpenCalls


async def call(calls: OpenCalls) -> None:
    calls.enter("ann", 1.0)


async def ended_call(calls: OpenCalls) -> list[asyncio.Task[None]]:
    """The task of a call that has ended, and is held on to."""
    task = asyncio.create_task(call(calls))
    await task
    await asyncio.sleep(0)  # until then, what has woken us holds on to it, too
    return [task]


async def test_a_place_is_held_until_the_calls_task_is_gone() -> None:
    calls = OpenCalls("open calls", 1)
    held = await ended_call(calls)
    with pytest.raises(Overloaded):
        await call(calls)
    held.clear()
    await asyncio.sleep(0)
    assert len(calls) == 0


async def test_a_task_that_goes_in_the_midst_of_other_work_changes_nothing_before_that_is_done() -> None:
    calls = OpenCalls("open calls", 8)
    held = await ended_call(calls)
    gone = weakref.ref(held[0])
    held.clear()  # as by the garbage collector, which comes whenever something is allocated
    assert (gone(), len(calls)) == (None, 1)
    await asyncio.sleep(0)
    assert len(calls) == 0


async def test_a_task_that_goes_in_another_thread_gives_its_place_back_on_the_loop() -> None:
    calls = OpenCalls("open calls", 8)
    held = await ended_call(calls)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert len(calls) == 1
    await asyncio.sleep(0)
    assert len(calls) == 0

"""Whose request is received now: shares of the turns, and what becomes of senders that stop in the middle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stagecoach.errors import DeadlineExceeded, Overloaded
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES
from stagecoach_router.frontend.reading_turns import READ_TIMEOUT_S, ReadingTurns

LONG_S = 60.0


class Sender:
    """A call whose request comes when `sent` is set."""

    def __init__(self) -> None:
        self.is_read = asyncio.Event()
        self.is_being_read = False
        self.sent = asyncio.Event()

    async def read(self) -> bytes:
        self.is_read.set()
        self.is_being_read = True
        try:
            await self.sent.wait()
        finally:
            self.is_being_read = False
        return b"request"

    def read_in_turn(self, turns: ReadingTurns, caller: str) -> asyncio.Task[Any]:
        context: Any = self
        return asyncio.create_task(turns.read(context, caller))


def test_the_largest_request_comes_in_time_over_a_slow_link() -> None:
    bits_per_s = 1_000_000
    assert MAX_PUBLIC_MESSAGE_BYTES * 8 / bits_per_s < READ_TIMEOUT_S


async def settle() -> None:
    """Lets everything that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def begin(turns: ReadingTurns, caller: str, num: int) -> tuple[list[Sender], list[asyncio.Task[Any]]]:
    senders = [Sender() for _ in range(num)]
    return senders, [sender.read_in_turn(turns, caller) for sender in senders]


async def cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def num_turns(turns: ReadingTurns) -> int:
    """How many turns are free for somebody who holds none."""
    senders, tasks = begin(turns, "nobody", 100)
    await settle()
    num = sum(sender.is_being_read for sender in senders)
    await cancel(tasks)
    return num


async def test_a_caller_that_sends_nothing_is_in_nobody_elses_way() -> None:
    turns = ReadingTurns(18, 9, quick_s=LONG_S)
    stalled, tasks = begin(turns, "stalled", 50)
    honest = Sender()
    honest.sent.set()
    assert await honest.read_in_turn(turns, "honest") == b"request"
    assert sum(sender.is_read.is_set() for sender in stalled) == 16
    await cancel(tasks)


async def test_next_is_the_caller_with_the_fewest_turns_and_of_its_calls_the_first() -> None:
    turns = ReadingTurns(2, 1, quick_s=LONG_S)
    (first, *many), tasks = begin(turns, "many", 6)
    (early, late), few = begin(turns, "few", 2)
    await settle()
    assert [each.is_read.is_set() for each in (first, *many, early, late)] == [True] * 2 + [False] * 6
    first.sent.set()
    await settle()
    assert (early.is_read.is_set(), late.is_read.is_set(), many[1].is_read.is_set()) == (True, False, False)
    await cancel(tasks + few)
    assert await num_turns(turns) == 2


async def test_a_slow_sender_needs_a_turn_for_slow_ones_and_leaves_its_quick_turn() -> None:
    turns = ReadingTurns(4, 2, quick_s=0.0)
    slow, tasks = begin(turns, "slow", 4)
    await asyncio.wait(tasks[2:])
    for task in tasks[2:]:
        with pytest.raises(Overloaded) as caught:
            task.result()
        assert caught.value.limit == "2"
        assert caught.value.retry_after_s > 0
    for sender in slow[:2]:
        sender.sent.set()
    assert [await task for task in tasks[:2]] == [b"request"] * 2


async def test_what_does_not_come_in_time_ends_whether_quick_or_slow() -> None:
    for quick_s in (0.0, LONG_S):
        turns = ReadingTurns(4, 2, read_timeout_s=0.02, quick_s=quick_s)
        with pytest.raises(DeadlineExceeded) as caught:
            await Sender().read_in_turn(turns, "a")
        assert caught.value.limit == "0.02"
    assert await num_turns(turns) == 4


async def test_whose_turn_does_not_come_is_told_to_come_again() -> None:
    turns = ReadingTurns(1, 1, read_timeout_s=0.05, quick_s=LONG_S)
    [holder], [holding] = begin(turns, "a", 1)
    await holder.is_read.wait()
    with pytest.raises(Overloaded) as caught:
        await Sender().read_in_turn(turns, "b")
    assert (caught.value.limit, caught.value.retry_after_s) == ("1", 1.0)
    await cancel([holding])
    assert await num_turns(turns) == 1


async def test_who_goes_away_while_waiting_or_just_as_the_turn_comes_leaves_it_to_others() -> None:
    turns = ReadingTurns(1, 1, quick_s=LONG_S)
    [holder], [holding] = begin(turns, "a", 1)
    await holder.is_read.wait()
    _, [gone] = begin(turns, "b", 1)
    _, [late] = begin(turns, "b", 1)
    await settle()
    await cancel([gone])
    holder.sent.set()
    await holding  # at this moment the turn is given to `late`, which does not know it yet
    late.cancel()
    await asyncio.wait([late])
    assert await num_turns(turns) == 1


async def test_of_calls_that_come_and_go_at_random_no_turn_is_lost() -> None:
    turns = ReadingTurns(5, 2, read_timeout_s=0.2, quick_s=0.002)
    tasks = []
    for number in range(300):
        sender = Sender()
        tasks.append(sender.read_in_turn(turns, str(number % 7)))
        if number % 3 == 0:
            sender.sent.set()
        if number % 5 == 0:
            tasks[number // 2].cancel()
        await asyncio.sleep(0)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, (bytes, asyncio.CancelledError, Overloaded, DeadlineExceeded)) for end in ends), (
        "nobody gives a turn back twice, which is an AssertionError"
    )
    # Where counting takes longer than `quick_s`, some have become slow, and others have their quick turns.
    assert 5 <= await num_turns(turns) <= 5 + 2

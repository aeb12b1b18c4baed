"""One job at a time, and only so many characters of them wait, also when their callers go away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from stagecoach.errors import InvalidArgument, Overloaded
from stagecoach_router.text.serial_queue import SerialQueue

TIMEOUT_S = 10.0


class Work:
    """Takes until it may end; counts how much of it runs at a time."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.num_begun = 0
        self.num_running = 0
        self.most_running = 0

    def __call__(self) -> str:
        self.num_begun += 1
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        assert self.may_end.wait(TIMEOUT_S)
        self.num_running -= 1
        return "tokens"


def begin(work: Callable[[], object]) -> Callable[[], asyncio.Future[object]]:
    return lambda: asyncio.get_running_loop().run_in_executor(None, work)


async def begun(work: Work, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while work.num_begun < count:
            await asyncio.sleep(0.001)


async def test_one_at_a_time_and_in_order() -> None:
    queue, work = SerialQueue("to be tokenized"), Work()
    tasks = [asyncio.create_task(queue.run("ann", 10, begin(work))) for _ in range(5)]
    await begun(work, 1)
    assert queue.size == 50
    work.may_end.set()
    assert await asyncio.gather(*tasks) == ["tokens"] * 5
    assert (work.most_running, queue.size) == (1, 0)


async def test_what_would_make_too_much_wait_is_refused_at_once() -> None:
    queue, work = SerialQueue("to be tokenized", max_size=100), Work()
    first = asyncio.create_task(queue.run("ann", 80, begin(work)))
    await begun(work, 1)
    with pytest.raises(Overloaded) as caught:
        await queue.run("ann", 30, begin(work))
    assert caught.value.retry_after_s > 0
    assert queue.size == 80
    work.may_end.set()
    await first


async def test_a_text_above_the_limit_is_taken_where_no_other_waits() -> None:
    work = Work()
    work.may_end.set()
    assert await SerialQueue("to be tokenized", max_size=100).run("ann", 1000, begin(work)) == "tokens"


async def test_callers_that_go_away_do_not_make_more_than_one_thread_work() -> None:
    queue, work = SerialQueue("to be tokenized", max_size=100), Work()
    for _ in range(5):
        task = asyncio.create_task(queue.run("ann", 10, begin(work)))
        await asyncio.sleep(0)
        await begun(work, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert (work.num_begun, queue.size) == (1, 10), "the first one's text is encoded still"
    work.may_end.set()
    assert await queue.run("ann", 10, begin(work)) == "tokens"
    assert (work.most_running, queue.size) == (1, 0)


async def test_an_error_leaves_the_queue_as_it_was() -> None:
    queue = SerialQueue("to be tokenized")

    def fail() -> None:
        raise InvalidArgument("no text")

    with pytest.raises(InvalidArgument):
        await queue.run("ann", 10, begin(fail))
    assert queue.size == 0


async def test_work_that_cannot_be_started_leaves_it_as_it_was_too() -> None:
    queue, work = SerialQueue("to be tokenized"), Work()

    def cannot_start() -> asyncio.Future[str]:
        raise RuntimeError("cannot schedule new futures after shutdown")

    with pytest.raises(RuntimeError):
        await queue.run("ann", 10, cannot_start)
    assert queue.size == 0
    work.may_end.set()
    async with asyncio.timeout(10):
        assert await queue.run("ann", 10, begin(work)) == "tokens"


async def test_who_waits_too_long_for_a_turn_is_told_to_come_back() -> None:
    queue, work = SerialQueue("to be tokenized", max_wait_s=0.01), Work()
    first = asyncio.create_task(queue.run("ann", 10, begin(work)))
    await begun(work, 1)
    with pytest.raises(Overloaded, match="no turn"):
        await queue.run("ann", 10, begin(work))
    assert queue.size == 10
    work.may_end.set()
    assert await first == await queue.run("ann", 10, begin(work)) == "tokens"


async def test_who_has_much_waiting_keeps_nobody_else_waiting() -> None:
    queue, order = SerialQueue("to be rendered"), []

    def job(name: str) -> Callable[[], asyncio.Future[None]]:
        async def work() -> None:
            order.append(name)

        return lambda: asyncio.ensure_future(work())

    hog = [asyncio.create_task(queue.run("hog", 10, job("hog"))) for _ in range(50)]
    await asyncio.sleep(0)
    late = [asyncio.create_task(queue.run(name, 10, job(name))) for name in ("ann", "bob")]
    await asyncio.gather(*hog, *late)
    assert max(order.index("ann"), order.index("bob")) <= 4
    assert len(order) == 52


async def test_one_caller_does_not_have_all_the_room_there_is() -> None:
    queue, work = SerialQueue("to be tokenized", max_size=90), Work()
    tasks = [asyncio.create_task(queue.run("hog", 10, begin(work))) for _ in range(9)]
    await begun(work, 1)
    assert queue.size == 80, "eight ninths: the last one was refused"
    with pytest.raises(Overloaded, match="by this caller"):
        await tasks[-1]
    tasks.append(asyncio.create_task(queue.run("ann", 5, begin(work))))
    await asyncio.sleep(0)
    assert queue.size == 85
    work.may_end.set()
    await asyncio.gather(*tasks[:8], tasks[9])


async def test_a_turn_that_comes_just_when_its_caller_goes_is_the_next_ones() -> None:
    queue, work = SerialQueue("to be tokenized"), Work()
    first = asyncio.create_task(queue.run("ann", 10, begin(work)))
    await begun(work, 1)
    gone, last = (asyncio.create_task(queue.run(name, 10, begin(work))) for name in ("bob", "cat"))
    await asyncio.sleep(0)
    first.add_done_callback(lambda _: gone.cancel())
    work.may_end.set()
    async with asyncio.timeout(TIMEOUT_S):
        assert await last == "tokens"
    assert queue.size == 0

"""Long texts are encoded one at a time, and only so many bytes of them wait, also when their callers go away."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stagecoach.errors import InvalidArgument, Overloaded
from stagecoach_router.text.tokenizer_worker import TokenizerWorker

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


async def begun(work: Work, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while work.num_begun < count:
            await asyncio.sleep(0.001)


async def test_one_at_a_time_and_in_order() -> None:
    line, work = TokenizerWorker(), Work()
    tasks = [asyncio.create_task(line.encode(10, work)) for _ in range(5)]
    await begun(work, 1)
    assert line.num_bytes == 50
    work.may_end.set()
    assert await asyncio.gather(*tasks) == ["tokens"] * 5
    assert (work.most_running, line.num_bytes) == (1, 0)


async def test_what_would_make_too_many_bytes_wait_is_refused_at_once() -> None:
    line, work = TokenizerWorker(max_bytes=100), Work()
    first = asyncio.create_task(line.encode(80, work))
    await begun(work, 1)
    with pytest.raises(Overloaded) as caught:
        await line.encode(30, work)
    assert caught.value.retry_after_s > 0
    assert line.num_bytes == 80
    work.may_end.set()
    await first


async def test_a_text_above_the_limit_is_taken_where_no_other_waits() -> None:
    work = Work()
    work.may_end.set()
    assert await TokenizerWorker(max_bytes=100).encode(1000, work) == "tokens"


async def test_callers_that_go_away_do_not_make_more_than_one_thread_work() -> None:
    line, work = TokenizerWorker(max_bytes=100), Work()
    for _ in range(5):
        task = asyncio.create_task(line.encode(10, work))
        await asyncio.sleep(0)
        await begun(work, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert (work.num_begun, line.num_bytes) == (1, 10), "the first one's text is encoded still; the others have left"
    work.may_end.set()
    assert await line.encode(10, work) == "tokens"
    assert (work.most_running, line.num_bytes) == (1, 0)


async def test_an_error_leaves_the_line_as_it_was() -> None:
    line = TokenizerWorker()

    def fail() -> None:
        raise InvalidArgument("no text")

    with pytest.raises(InvalidArgument):
        await line.encode(10, fail)
    assert line.num_bytes == 0

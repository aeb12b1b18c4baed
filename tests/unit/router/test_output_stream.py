"""The deltas of one request reach its readers in order, all that wait at a time, and then the end or the error."""

from __future__ import annotations

import asyncio

import pytest

from stagecoach.errors import Overloaded, StagecoachError, Unavailable
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.requests.completion import FinishReason, OutputDelta
from stagecoach_router.requests.output_stream import MAX_UNREAD_DELTAS, OutputReader
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import MAX_DELTAS_READ, RequestState
from stagecoach_router.sampling.outputs import Sampled


def delta(token_id: int, index: int = 0, *, last: bool = False) -> OutputDelta:
    return OutputDelta(index, "x", token_id, Sampled(token_id, None, ()), FinishReason.LENGTH if last else None)


def request_state(n: int = 1) -> RequestState:
    return RequestState(Request("r", (1, 2), SamplingParams(n=n, max_tokens=9)))


async def read(reader: OutputReader) -> list[int]:
    return [each.token_id for each in await reader.read()]


async def test_what_waits_is_read_at_once_and_in_order() -> None:
    state = request_state()
    reader = OutputReader(state)
    for token_id in range(3):
        state.put(delta(token_id))
    assert await read(reader) == [0, 1, 2]


async def test_a_reader_that_waits_is_woken_by_each_piece() -> None:
    state = request_state()
    reader = OutputReader(state)
    for token_id in range(3):
        reading = asyncio.create_task(read(reader))
        await asyncio.sleep(0)
        assert not reading.done()
        state.put(delta(token_id))
        assert await reading == [token_id]


async def test_after_the_last_piece_of_every_completion_comes_the_end() -> None:
    state = request_state(2)
    reader = OutputReader(state)
    state.put(delta(1, 0, last=True))
    assert await read(reader) == [1]
    assert not state.ended
    state.put(delta(2, 1, last=True))
    assert state.ended
    assert [await read(reader) for _ in range(3)] == [[2], [], []]


async def test_an_error_comes_after_what_was_put_before_it() -> None:
    state = request_state()
    reader = OutputReader(state)
    state.put(delta(1))
    state.fail(Unavailable("lost"))
    assert len(await reader.read()) == 1
    for _ in range(2):
        with pytest.raises(Unavailable, match="lost"):
            await reader.read()


async def test_an_error_wakes_a_reader_that_waits() -> None:
    state = request_state()
    reading = asyncio.create_task(OutputReader(state).read())
    await asyncio.sleep(0)
    state.fail(Unavailable("lost"))
    with pytest.raises(Unavailable):
        await reading


async def test_a_reader_that_was_cancelled_loses_nothing() -> None:
    state = request_state()
    reader = OutputReader(state)
    reading = asyncio.create_task(reader.read())
    await asyncio.sleep(0)
    reading.cancel()
    state.put(delta(7))
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await read(reader) == [7]


async def test_a_second_reader_begins_where_it_says_in_each_completion() -> None:
    state = request_state(2)
    first = OutputReader(state)
    for token_id in range(10):
        state.put(delta(token_id, token_id % 2))
    assert await read(first) == list(range(10))
    second = OutputReader(state, [3, 4])
    assert await read(second) == [6, 8, 9]
    state.put(delta(10))
    assert await read(first) == await read(second) == [10]


async def test_a_reader_that_is_ahead_of_what_there_is_waits_for_the_next_one() -> None:
    state = request_state()
    reader = OutputReader(state, [2])
    state.put(delta(0))
    reading = asyncio.create_task(read(reader))
    await asyncio.sleep(0)
    state.put(delta(1))
    await asyncio.sleep(0)
    assert not reading.done()
    state.put(delta(2))
    assert await reading == [2]


async def test_a_reader_that_has_everything_gets_the_end_or_the_error() -> None:
    finished, failed = request_state(), request_state()
    finished.put(delta(0, last=True))
    failed.put(delta(0))
    failed.fail(Unavailable("lost"))
    assert await read(OutputReader(finished, [1])) == []
    with pytest.raises(Unavailable, match="lost"):
        await read(OutputReader(failed, [1]))


async def read_all(reader: OutputReader) -> list[int]:
    taken: list[int] = []
    while batch := await read(reader):
        taken += batch
    return taken


@pytest.mark.parametrize(("n", "from_tokens"), [(1, []), (1, [3000]), (2, []), (2, [3000, 1000])])
async def test_a_caller_that_comes_back_late_reads_all_that_has_come_meanwhile(n: int, from_tokens: list[int]) -> None:
    """However much that is: it is there anyway, so nothing is gained by refusing it."""
    total = 2 * MAX_UNREAD_DELTAS + 1000
    state = request_state(n)
    for number in range(total):
        state.put(delta(number, number % n))
    reader = OutputReader(state, from_tokens)
    for index in range(n):
        state.put(delta(total + index, index, last=True))
    skipped = {n * token + index for index, skip in enumerate(from_tokens) for token in range(skip)}
    assert await read_all(reader) == [number for number in range(total + n) if number not in skipped]


async def test_a_reader_that_falls_further_behind_than_it_began_is_cut_off_alone() -> None:
    state = request_state()
    for number in range(10):
        state.put(delta(number))
    slow, quick = OutputReader(state), OutputReader(state)
    for number in range(10, 10 + MAX_UNREAD_DELTAS):
        state.put(delta(number))
        await quick.read()
    assert len(await slow.read()) == MAX_DELTAS_READ
    for number in range(MAX_DELTAS_READ + 1):
        state.put(delta(number))
        await quick.read()
    with pytest.raises(Overloaded, match="not being read") as caught:
        await slow.read()
    assert caught.value.value == str(10 + MAX_UNREAD_DELTAS + 1)
    assert not state.ended
    state.put(delta(7, last=True))
    assert await read_all(quick) == [7]


@pytest.mark.parametrize("num_stalls", [1, 3])
async def test_a_reader_that_had_read_all_is_not_late_for_what_comes_in_one_go(num_stalls: int) -> None:
    """As after a journal's slow write of a wide answer."""
    n, total = 2, 2 * MAX_UNREAD_DELTAS + 500
    state = request_state(n)
    state.tap = lambda _: None
    reader = OutputReader(state)
    taken: list[int] = []
    for stall in range(num_stalls):
        for number in range(total):
            state.put(delta(stall * total + number, number % n))
        reading = asyncio.create_task(read(reader))
        await asyncio.sleep(0)
        assert not reading.done()
        state.show(total)
        taken += await reading
        while len(taken) < (stall + 1) * total:
            taken += await read(reader)
    assert taken == list(range(num_stalls * total))


async def test_a_wide_answer_may_wait_in_proportion() -> None:
    n = 4
    state = request_state(n)
    reader = OutputReader(state)
    for number in range(n * MAX_UNREAD_DELTAS):
        state.put(delta(number, number % n))
    assert await read(reader)
    for number in range(MAX_DELTAS_READ + 1):
        state.put(delta(number))
    with pytest.raises(Overloaded, match="not being read"):
        await reader.read()


async def test_what_is_tapped_is_read_when_it_is_shown_and_not_before() -> None:
    state = request_state()
    tapped: list[OutputDelta] = []
    ends: list[StagecoachError | None] = []
    state.tap, state.on_end = tapped.append, ends.append
    reader = OutputReader(state)
    state.put(delta(1))
    state.put(delta(2, last=True))
    reading = asyncio.create_task(read(reader))
    await asyncio.sleep(0)
    assert not reading.done()
    state.show(1)
    assert await reading == [1]
    assert not state.ended
    state.show(1)
    assert await read(reader) == [2]
    assert [each.token_id for each in tapped] == [1, 2]
    assert ends == [None]


async def test_the_end_is_told_once() -> None:
    state = request_state()
    ends: list[StagecoachError | None] = []
    state.on_end = ends.append
    error = Unavailable("lost")
    state.fail(error)
    state.fail(Unavailable("again"))
    state.show(1)
    assert ends == [error]


async def test_a_late_reader_gets_no_more_at_a_time_than_fits_a_message() -> None:
    state = request_state()
    total = 3 * MAX_DELTAS_READ + 7
    for number in range(total):
        state.put(delta(number, last=number == total - 1))
    for skipped in (0, 5, 2 * MAX_DELTAS_READ, 2 * MAX_DELTAS_READ + 5, total):
        reader = OutputReader(state, [skipped])
        taken: list[OutputDelta] = []
        while batch := await reader.read():
            assert len(batch) <= MAX_DELTAS_READ
            taken += batch
        assert [one.token_id for one in taken] == list(range(skipped, total))

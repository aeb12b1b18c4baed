"""A request that names no limit ends where there is no more room, also when that becomes less meanwhile. No network."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from stagecoach.errors import InvalidArgument, OutOfRange
from stagecoach_router.durability.journal_records import read_request, write_request
from stagecoach_router.durability.journal_store import JournaledRequest
from stagecoach_router.requests.completion import FinishReason
from stagecoach_router.requests.output_stream import OutputReader
from stagecoach_router.requests.request import CutShort
from stagecoach_router.sampling.outputs import Sampled
from tests.unit.router.fake_pipelines import BLOCK_SIZE, VOCAB_SIZE, FakeCluster, request
from tests.unit.router.memory_pipeline import MemoryPipeline, expected_tokens

PROMPT = 10
ROOM = 8 * BLOCK_SIZE - PROMPT


async def comes_back_smaller(asked, *, num_tokens, num_blocks):
    """The request, after its pipeline came back with fewer blocks when it had so many tokens, and all has ended."""
    pipeline = MemoryPipeline(8)
    cluster = FakeCluster(pipeline, max_running=8)
    replica = await cluster.open()
    pipeline.answer_one()
    state = cluster.submit(asked)
    while max(each.num_tokens for each in state.completions) < num_tokens:
        assert pipeline.answer_one()
    pipeline.break_down()
    pipeline.num_blocks = num_blocks
    await replica.open()
    while pipeline.answer_one():
        pass
    assert replica.num_sequences == 0
    assert replica.scheduler.blocks.num_free == num_blocks
    return state


def outputs_of(state):
    tokens, reasons = {}, {}
    for delta in state.read_from(0):
        assert delta.index not in reasons, "nothing comes after the end"
        if delta.sampled is not None:
            tokens.setdefault(delta.index, []).append(delta.token_id)
        if delta.finish_reason is not None:
            reasons[delta.index] = delta.finish_reason
    return tokens, reasons


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 30, 2 * BLOCK_SIZE - PROMPT, 2 * BLOCK_SIZE - PROMPT + 1])
async def test_it_ends_with_length_when_its_pipeline_comes_back_smaller(num_tokens, n):
    asked = request("a", num_prompt=PROMPT, max_tokens=ROOM, n=n, names_limit=False)
    state = await comes_back_smaller(asked, num_tokens=num_tokens, num_blocks=2)
    tokens, reasons = outputs_of(state)
    assert state.ended
    assert state.error is None
    assert reasons == dict.fromkeys(range(n), FinishReason.LENGTH)
    assert max(map(len, tokens.values())) == max(num_tokens, 2 * BLOCK_SIZE - PROMPT)
    for each in tokens.values():
        assert each == expected_tokens(asked.prompt_tokens, len(each))
        assert len(each) >= 2 * BLOCK_SIZE - PROMPT


async def test_one_that_names_its_limit_fails():
    asked = request("a", num_prompt=PROMPT, max_tokens=ROOM)
    state = await comes_back_smaller(asked, num_tokens=3, num_blocks=2)
    assert isinstance(state.error, OutOfRange)


async def test_a_prompt_that_does_not_fit_any_more_fails():
    asked = request("a", num_prompt=BLOCK_SIZE, max_tokens=50, names_limit=False)
    state = await comes_back_smaller(asked, num_tokens=0, num_blocks=1)
    assert isinstance(state.error, OutOfRange)


async def test_it_goes_to_the_pipeline_with_most_room():
    pipelines = MemoryPipeline(8), MemoryPipeline(8)
    cluster = FakeCluster(*pipelines)
    replicas = [await cluster.open() for _ in pipelines]
    asked = request("a", num_prompt=PROMPT, max_tokens=ROOM, names_limit=False)
    for pipeline in pipelines:
        pipeline.answer_one()
        pipeline.break_down()
    state = cluster.submit(asked)
    for replica, pipeline, num_blocks in zip(reversed(replicas), reversed(pipelines), (4, 2), strict=True):
        pipeline.num_blocks = num_blocks
        await replica.open()
    while any(pipeline.answer_one() for pipeline in pipelines):
        pass
    tokens, reasons = outputs_of(state)
    assert reasons == {0: FinishReason.LENGTH}
    assert tokens[0] == expected_tokens(asked.prompt_tokens, 4 * BLOCK_SIZE - PROMPT)


async def test_the_end_is_read_by_who_comes_back_with_all_tokens():
    asked = request("a", num_prompt=PROMPT, max_tokens=ROOM, names_limit=False)
    state = await comes_back_smaller(asked, num_tokens=40, num_blocks=2)
    reader = OutputReader(state, (40,))
    [end] = await reader.read()
    assert (end.sampled, end.finish_reason) == (None, FinishReason.LENGTH)
    assert await reader.read() == []


@pytest.mark.parametrize("num_tokens", [5, 2 * BLOCK_SIZE - PROMPT, 40])
async def test_a_router_that_comes_back_with_a_smaller_pipeline_goes_on_with_it(num_tokens):
    asked = request("a", num_prompt=PROMPT, max_tokens=ROOM, names_limit=False)
    asked = read_request(asked.request_id, write_request(asked), asked.cache_salt)
    past = [Sampled(token_id, None, ()) for token_id in expected_tokens(asked.prompt_tokens, num_tokens)]
    pipeline = MemoryPipeline(2)
    cluster = FakeCluster(pipeline)
    await cluster.open()
    state = cluster.submit(asked, [past])
    while pipeline.answer_one():
        pass
    tokens, reasons = outputs_of(state)
    assert reasons == {0: FinishReason.LENGTH}
    assert tokens[0] == expected_tokens(asked.prompt_tokens, max(num_tokens, 2 * BLOCK_SIZE - PROMPT))


def test_a_journal_of_before_names_limits():
    asked = request("a")
    content = write_request(asked).replace(', "names_limit": true', "")
    assert "names_limit" not in content
    assert read_request(asked.request_id, content, asked.cache_salt) == asked


@pytest.mark.parametrize("names_limit", [False, True])
async def test_a_completion_that_has_ended_needs_no_room(names_limit):
    asked = request("a", num_prompt=PROMPT, max_tokens=30 if names_limit else ROOM, n=2, names_limit=names_limit)
    pipeline = MemoryPipeline(8)
    cluster = FakeCluster(pipeline)
    replica = await cluster.open()
    pipeline.answer_one()
    state = cluster.submit(asked)
    state.completions[0].limit(5)
    while state.completions[1].num_tokens < 8:
        assert pipeline.answer_one()
    state.sequences[0].token_limit = 8 * BLOCK_SIZE  # as where the other one's limit is lower by then
    pipeline.break_down()
    pipeline.num_blocks = 3
    await replica.open()
    while pipeline.answer_one():
        pass
    tokens, reasons = outputs_of(state)
    assert reasons == {0: FinishReason.LENGTH, 1: FinishReason.LENGTH}
    assert tokens[1] == expected_tokens(asked.prompt_tokens, 30 if names_limit else 3 * BLOCK_SIZE - PROMPT)


def past_of(state):
    """What the journal has of a request: itself, and its tokens by completion."""
    tokens, _ = outputs_of(state)
    past = [
        [Sampled(token_id, None, ()) for token_id in tokens.get(index, [])] for index in range(state.request.params.n)
    ]
    asked = read_request(state.request.request_id, write_request(state.request), state.request.cache_salt)
    JournaledRequest(("", asked.request_id), b"", asked, past).check(vocab_size=VOCAB_SIZE, context_length=256)
    return asked, past


async def comes_back(asked, past, *, num_blocks):
    """The request, after a router has come back with so many blocks, and all has ended."""
    pipeline = MemoryPipeline(num_blocks)
    cluster = FakeCluster(pipeline)
    await cluster.open()
    state = cluster.submit(asked, past)
    while pipeline.answer_one():
        pass
    return state


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 2 * BLOCK_SIZE - PROMPT, 30])
async def test_what_has_ended_for_want_of_room_stays_ended_when_a_router_comes_back_with_more(num_tokens, n):
    """Its caller was told `length`. The end came with a token, or without, and among several where each was."""
    asked = request("a", num_prompt=PROMPT, max_tokens=ROOM, n=n, names_limit=False)
    former = await comes_back_smaller(asked, num_tokens=num_tokens, num_blocks=2)
    state = await comes_back(*past_of(former), num_blocks=8)
    assert outputs_of(state) == outputs_of(former)
    assert state.ended
    assert [each.sampled is None for each in state.read_from(0) if each.finish_reason] == [
        each.sampled is None for each in sorted(former.read_from(0), key=lambda each: each.index) if each.finish_reason
    ]


@pytest.mark.parametrize("lengths", [(10, 2), (2, 10), (10, 0), (6, 5), (10, 10)])
async def test_of_several_completions_what_fits_a_smaller_pipeline_goes_on_and_the_others_end(lengths):
    asked = request("a", num_prompt=PROMPT, max_tokens=ROOM, n=2, names_limit=False)
    past = [[Sampled(token_id, None, ()) for token_id in expected_tokens(asked.prompt_tokens, n)] for n in lengths]
    state = await comes_back(asked, past, num_blocks=1)
    tokens, reasons = outputs_of(state)
    assert state.ended
    assert state.error is None
    assert reasons == {0: FinishReason.LENGTH, 1: FinishReason.LENGTH}
    for index, num_past in enumerate(lengths):
        assert tokens[index] == expected_tokens(asked.prompt_tokens, max(num_past, BLOCK_SIZE - PROMPT))
    again = await comes_back(*past_of(state), num_blocks=8)
    assert outputs_of(again) == (tokens, reasons)


async def test_a_caller_with_all_tokens_is_told_that_a_smaller_pipeline_was_the_end():
    asked = request("a", num_prompt=PROMPT, max_tokens=ROOM, names_limit=False)
    past = [[Sampled(token_id, None, ()) for token_id in expected_tokens(asked.prompt_tokens, 10)]]
    reader = OutputReader(await comes_back(asked, past, num_blocks=1), (10,))
    [end] = await reader.read()
    assert (end.sampled, end.finish_reason) == (None, FinishReason.LENGTH)


async def test_where_the_prompt_does_not_fit_any_more_what_was_begun_ends_and_what_was_not_fails():
    asked = request("a", num_prompt=BLOCK_SIZE, max_tokens=50, n=2, names_limit=False)
    state = await comes_back(asked, [[Sampled(7, None, ())], []], num_blocks=1)
    assert outputs_of(state) == ({0: [7]}, {0: FinishReason.LENGTH, 1: FinishReason.LENGTH})
    with pytest.raises(OutOfRange):
        await comes_back(asked, [[], []], num_blocks=1)


@pytest.mark.parametrize("end", [(2, 1, True), (0, 2, True), (0, 0, False), (1, 1, False)])
def test_an_end_that_cannot_have_been_is_not_gone_on_with(end):
    asked = replace(request("a", n=2, names_limit=False), cut_short=(CutShort(*end),))
    past = [[Sampled(7, None, ())], []]
    with pytest.raises(InvalidArgument, match="cut_short"):
        JournaledRequest(("", "a"), b"", asked, past).check(vocab_size=VOCAB_SIZE, context_length=256)


@pytest.mark.parametrize("ends", [[[0, 0, True]], [[-1, 1, True]], [[0, 1]], [[0, 1, 1]], 7, ["abc"]])
def test_an_end_that_is_none_is_not_read(ends):
    content = json.dumps(json.loads(write_request(request("a", names_limit=False))) | {"cut_short": ends})
    with pytest.raises(InvalidArgument, match="cut_short"):
        read_request("a", content, b"")

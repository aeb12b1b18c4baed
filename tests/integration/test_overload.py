"""More callers than there is room for: each gets exactly its answer, or is told when to come back, or ends in time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from stagecoach import errors
from stagecoach.errors.status import STATUS_METADATA_KEY
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_client import AsyncClient
from stagecoach_router.tenants.fair_share import FairShare
from stagecoach_router.text.tokenizer import Encoded, TextKind, Tokenizer
from tests.cluster import cluster, free_port, status_becomes
from tests.held_stage import held_stages
from tests.tiny_model import greedy, random_prompts, reference_tokens

TIMEOUT_S = 60.0
GENERATE = "/stagecoach.v1.Inference/Generate"


def is_idle(status) -> bool:
    busy = (status.num_running, status.num_waiting)
    return busy == (0, 0) and status.num_free_blocks == status.num_blocks


@asynccontextmanager
async def overloaded(model, *ranges, **settings) -> AsyncIterator[tuple[AsyncClient, InferenceStub, str]]:
    """A cluster: the SDK's client, a stub that sends each call once, over one connection, and the address."""
    address = f"127.0.0.1:{free_port()}"
    async with (
        cluster(model, *ranges, listen=address, **settings) as client,
        connected(address) as channel,
    ):
        yield client, InferenceStub(channel), address


def connected(address: str, *, window_bytes: int | None = None) -> grpc.aio.Channel:
    """A channel with a connection of its own; of each answer, it takes at most `window_bytes` ahead of its reader."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if window_bytes is not None:
        options += [("grpc.http2.lookahead_bytes", window_bytes), ("grpc.http2.bdp_probe", 0)]
    return grpc.aio.insecure_channel(address, options=options)


def request(prompt: Sequence[int], num_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)


def long_answer(prompt: Sequence[int]) -> pb.GenerateRequest:
    """Many times what the system buffers of a stream that nobody reads."""
    asked = request(prompt, 400)
    asked.sampling.logprobs = 100
    return asked


async def outcome(stub: InferenceStub, prompt: Sequence[int], num_tokens: int, timeout_s: float):
    """The tokens of an answer, or the error of a call."""
    tokens: list[int] = []
    try:
        async for response in stub.Generate(request(prompt, num_tokens), timeout=timeout_s):
            tokens += response.token_ids
    except grpc.aio.AioRpcError as error:
        return error
    return tuple(tokens)


def retry_delay_s(error: grpc.aio.AioRpcError) -> float:
    [data] = [value for key, value in error.trailing_metadata() if key == STATUS_METADATA_KEY]
    retry = RetryInfo()
    assert Status.FromString(data).details[1].Unpack(retry)
    return retry.retry_delay.ToMilliseconds() / 1000


async def test_of_hundreds_at_once_each_is_answered_exactly_or_told_when_to_come_back(tiny_model, reference):
    prompts = random_prompts(4, 20)
    expected = [reference_tokens(reference, prompt, 8) for prompt in prompts]
    async with overloaded(tiny_model, max_running=8, max_waiting=16) as (client, stub, _):
        outcomes = await asyncio.gather(*(outcome(stub, prompts[i % 4], 8, TIMEOUT_S) for i in range(600)))
        await status_becomes(client, is_idle)
    answered = {i: each for i, each in enumerate(outcomes) if isinstance(each, tuple)}
    refused = [each for each in outcomes if not isinstance(each, tuple)]
    assert len(answered) >= FairShare("places", 8 + 16).most_for_one, "as many as one caller may have, at least"
    assert len(refused) >= 300
    for index, tokens in answered.items():
        assert tokens == expected[index % 4]
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(0.5 <= retry_delay_s(error) <= 30.0 for error in refused)


async def test_far_more_calls_than_may_be_open_are_told_when_to_come_back(tiny_model):
    [prompt] = random_prompts(1, 20)
    async with overloaded(tiny_model, max_running=2, max_waiting=2) as (client, stub, _):
        outcomes = await asyncio.gather(*(outcome(stub, prompt, 8, TIMEOUT_S) for _ in range(2500)))
        await status_becomes(client, is_idle)
    refused = [each for each in outcomes if not isinstance(each, tuple)]
    assert len(refused) >= 1500
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(retry_delay_s(error) >= 0.5 for error in refused)


async def test_those_that_wait_past_their_deadline_leave_their_places_to_others(tiny_model, reference, monkeypatch):
    prompts = random_prompts(3, 20)
    async with overloaded(tiny_model, ["0:4"], max_running=2, max_waiting=6) as (client, stub, _):
        with held_stages(monkeypatch) as goes_on:
            run = [asyncio.create_task(outcome(stub, prompt, 80, TIMEOUT_S)) for prompt in prompts[:2]]
            await status_becomes(client, lambda status: status.num_running == 2)
            goes_on.clear()
            wait = [asyncio.create_task(outcome(stub, prompts[2], 8, 0.5)) for _ in range(6)]
            await status_becomes(client, lambda status: status.num_waiting == 6)
            refused = await outcome(stub, prompts[2], 8, TIMEOUT_S)
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            codes = Counter(error.code() for error in await asyncio.gather(*wait))
            assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED: 6}
            await status_becomes(client, lambda status: (status.num_running, status.num_waiting) == (2, 0))
            late = [asyncio.create_task(outcome(stub, prompts[2], 8, TIMEOUT_S)) for _ in range(6)]
            await status_becomes(client, lambda status: status.num_waiting == 6)
            goes_on.set()
            answers = await asyncio.gather(*run, *late)
        await status_becomes(client, is_idle)
    assert answers[:2] == [reference_tokens(reference, prompt, 80) for prompt in prompts[:2]]
    assert answers[2:] == [reference_tokens(reference, prompts[2], 8)] * 6


async def test_callers_that_never_read_lose_their_calls_and_others_are_served_meanwhile(tiny_model, reference):
    prompt, other = random_prompts(2, 20)
    settings = {"max_running": 4, "max_waiting": 4, "max_stall_s": 0.5}
    async with (
        overloaded(tiny_model, ["0:4"], **settings) as (client, stub, address),
        connected(address, window_bytes=4096) as hostile,
    ):
        calls = [hostile.unary_stream(GENERATE)(long_answer(prompt).SerializeToString()) for _ in range(4)]
        await status_becomes(client, lambda status: status.num_running == 4)
        assert await outcome(stub, other, 8, TIMEOUT_S) == reference_tokens(reference, other, 8)
        await status_becomes(client, is_idle)  # generated to the end, and never read
        assert await outcome(stub, other, 8, TIMEOUT_S) == reference_tokens(reference, other, 8)
        for call in calls:  # and who reads after all learns what happened, and does not wait for ever
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call:
                        pass
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_who_is_refused_costs_no_tokenizing_and_who_comes_back_for_an_answer_is_let_in(tiny_model, monkeypatch):
    encoded: list[str] = []
    encode = Tokenizer.encode_within

    def recorded(self, text: str, max_tokens: int, kind: TextKind) -> Encoded:
        encoded.append(text)
        return encode(self, text, max_tokens, kind)

    monkeypatch.setattr(Tokenizer, "encode_within", recorded)
    [prompt] = random_prompts(1, 20)
    async with overloaded(tiny_model, ["0:4"], max_running=1, max_waiting=1) as (client, stub, _):
        with held_stages(monkeypatch) as goes_on:
            known = request(prompt, 40)
            known.request_id = "known"
            first = stub.Generate(known)
            await status_becomes(client, lambda status: status.num_running == 1)
            goes_on.clear()
            second = stub.Generate(request(prompt, 8))
            await status_becomes(client, lambda status: status.num_waiting == 1)
            with pytest.raises(errors.Overloaded) as caught:
                await client.generate("a long prompt", **greedy(8))
            assert caught.value.retry_after_s > 0
            assert not encoded
            again = stub.Generate(known)
            goes_on.set()
            answers = [[token async for each in call for token in each.token_ids] for call in (first, again, second)]
        assert answers[0] == answers[1]
        assert [len(answer) for answer in answers] == [40, 40, 8]
        await client.generate("a long prompt", **greedy(8))
        assert encoded == ["a long prompt"]

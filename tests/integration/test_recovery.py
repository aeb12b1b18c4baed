"""A pipeline that breaks comes back, and the streams on it go on where they were."""

import asyncio

import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stagecoach import errors
from stagecoach_client import AsyncClient
from stagecoach_router.engine.step_loop import StepLoop
from stagecoach_router.server import SERVICE_NAME
from tests.cluster import start_router, start_shard, wait_until_ready
from tests.tiny_model import greedy, random_prompts, reference_tokens

RESTART_TIMEOUT_S = 30.0


@pytest.fixture
async def breakable(tiny_model):
    """A client, the router, and the two shards, of which tests may restart one."""
    shards = [start_shard(tiny_model, layers) for layers in ("0:2", "2:4")]
    router = start_router([shard.address for shard in shards], recovery_timeout_s=20.0)
    client = AsyncClient(router.address, max_retries=0)
    try:
        await wait_until_ready(client, router, *shards)
        yield client, router, shards
    finally:
        await client.aclose()
        for server in (router, *shards):
            await server.close()


@pytest.mark.parametrize("broken", [0, 1], ids=["first stage", "last stage"])
async def test_streams_survive_the_restart_of_a_shard(breakable, tiny_model, reference, broken):
    client, _, shards = breakable
    prompts = random_prompts(4, 25)
    sampled = {"token_ids": prompts[0], "seed": 5, "max_tokens": 150, "ignore_eos": True, "repetition_penalty": 1.2}
    undisturbed = await client.generate(**sampled)

    streams = [await client.generate(token_ids=prompt, stream=True, **greedy(150)) for prompt in prompts]
    streams.append(await client.generate(stream=True, **sampled))
    async with asyncio.timeout(RESTART_TIMEOUT_S):
        for stream in streams:
            await anext(stream)
        old = shards[broken]
        await old.close()
        shards[broken] = start_shard(tiny_model, "0:2" if broken == 0 else "2:4", listen=old.address)
        answers = await asyncio.gather(*(stream.collect() for stream in streams))
    for prompt, answer in zip(prompts, answers[:4], strict=True):
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 150)
    assert answers[4].completions[0].token_ids == undisturbed.completions[0].token_ids
    status = await client.status()
    assert status.pipelines[0].epoch >= 2
    assert status.num_free_blocks == status.num_blocks


async def test_requests_fail_with_a_reason_when_a_shard_does_not_come_back(tiny_model):
    shards = [start_shard(tiny_model, layers) for layers in ("0:2", "2:4")]
    router = start_router([shard.address for shard in shards], recovery_timeout_s=0.5)
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, *shards)
        stream = await client.generate(token_ids=[1, 2, 3], stream=True, **greedy(400))
        await anext(stream)
        await shards[1].close()
        with pytest.raises(errors.Unavailable, match="pipeline is lost") as caught:
            async with asyncio.timeout(RESTART_TIMEOUT_S):
                await stream.collect()
        assert caught.value.retryable
        assert not (await client.status()).ready
    await router.close()
    await shards[0].close()


async def test_health_says_what_is(tiny_model):
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address])
    async with (
        AsyncClient(router.address, max_retries=0) as client,
        grpc.aio.insecure_channel(router.address) as to_router,
        grpc.aio.insecure_channel(shard.address) as to_shard,
    ):
        watches = {
            "liveness": HealthStub(to_router).Watch(HealthCheckRequest(service="liveness"), wait_for_ready=True),
            "router": HealthStub(to_router).Watch(HealthCheckRequest(), wait_for_ready=True),
            "service": HealthStub(to_router).Watch(HealthCheckRequest(service=SERVICE_NAME), wait_for_ready=True),
            "shard": HealthStub(to_shard).Watch(HealthCheckRequest(), wait_for_ready=True),
        }
        async with asyncio.timeout(RESTART_TIMEOUT_S):
            for watch in watches.values():
                await status_becomes(watch, HealthCheckResponse.SERVING)
            assert (await client.status()).ready
            await shard.close()
            for name in ("router", "service"):
                await status_becomes(watches[name], HealthCheckResponse.NOT_SERVING)
            alive = await HealthStub(to_router).Check(HealthCheckRequest(service="liveness"))
            assert alive.status == HealthCheckResponse.SERVING
            shard = start_shard(tiny_model, "0:4", listen=shard.address)
            await status_becomes(watches["router"], HealthCheckResponse.SERVING)
    await router.close()
    await shard.close()


async def status_becomes(watch, status):
    async for response in watch:
        if response.status == status:
            return
    raise AssertionError("the watch ended")


async def test_a_router_that_stops_ends_its_streams_with_a_reason(tiny_model):
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address])
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        stream = await client.generate(token_ids=[1, 2, 3], stream=True, **greedy(400))
        await anext(stream)
        closing = asyncio.create_task(router.close())
        with pytest.raises(errors.Unavailable, match="stopping"):
            await stream.collect()
        await closing
    await shard.close()


async def test_a_row_without_numbers_is_a_fault_of_its_request_and_of_no_other(tiny_model, reference, monkeypatch):
    """What one request's numbers come to must not cost the others their pipeline."""
    from stagecoach_shard.runtime.stage import Stage

    logits = Stage.logits

    def first_row_is_broken(self, hidden_states):
        rows = logits(self, hidden_states)
        if len(rows) == 2:
            rows[0] = float("nan")
        return rows

    prompts = random_prompts(2, 5)
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address], lanes=1)
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        monkeypatch.setattr(Stage, "logits", first_row_is_broken)
        answers = await asyncio.gather(
            *(client.generate(token_ids=prompt, **greedy(30)) for prompt in prompts), return_exceptions=True
        )
        monkeypatch.undo()
        assert sorted(type(answer).__name__ for answer in answers) == ["Generation", "ShardFault"]
        [(prompt, answer)] = [
            (prompt, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
            if not isinstance(answer, errors.ShardFault)
        ]
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 30)
        status = await client.status()
        assert status.pipelines[0].epoch == 1
        assert status.num_free_blocks == status.num_blocks
    await router.close()
    await shard.close()


async def test_a_request_that_breaks_the_pipeline_each_time_is_given_up(tiny_model, monkeypatch):
    from stagecoach_shard.runtime.stage import Stage

    forward = Stage.forward

    def crash(self, inputs, *rest):
        if len(inputs) > 1:  # as the health probe is not
            raise RuntimeError("out of memory, say")
        return forward(self, inputs, *rest)

    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address])
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        monkeypatch.setattr(Stage, "forward", crash)
        with pytest.raises(errors.ShardFault, match="lost 4 times"):
            async with asyncio.timeout(RESTART_TIMEOUT_S):
                await client.generate(token_ids=[1, 2, 3], **greedy(4))
        monkeypatch.undo()
        async with asyncio.timeout(RESTART_TIMEOUT_S):
            answer = await client.generate(token_ids=[1, 2, 3], **greedy(4))
        assert answer.usage.completion_tokens == 4
    await router.close()
    await shard.close()


async def test_a_stage_that_breaks_with_whatever_it_computes_is_nobodys_fault(tiny_model, monkeypatch):
    from stagecoach_shard.runtime.stage import Stage

    def crash(self, *_):
        raise RuntimeError("out of memory, say")

    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address], recovery_timeout_s=1.0)
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        monkeypatch.setattr(Stage, "forward", crash)
        with pytest.raises(errors.Unavailable, match="the pipeline is lost"):
            async with asyncio.timeout(RESTART_TIMEOUT_S):
                await client.generate(token_ids=[1, 2, 3], **greedy(4))
    await router.close()
    await shard.close()


async def test_a_pipeline_that_comes_back_smaller_serves_what_still_fits(tiny_model, reference):
    shard = start_shard(tiny_model, "0:4", kv_cache_memory="1M", max_batch_tokens=256)
    router = start_router([shard.address], recovery_timeout_s=20.0)
    prompt = random_prompts(1, 25)[0]
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        before = (await client.status()).num_blocks
        small = await client.generate(token_ids=prompt, stream=True, **greedy(60))
        large = await client.generate(token_ids=prompt, stream=True, **greedy(400))
        without_limit = greedy(1) | {"max_tokens": None}
        unlimited = await client.generate(token_ids=prompt, stream=True, **without_limit)
        for stream in (small, large, unlimited):
            await anext(stream)
        await shard.close()
        shard = start_shard(tiny_model, "0:4", kv_cache_memory="100K", max_batch_tokens=16, listen=shard.address)
        async with asyncio.timeout(RESTART_TIMEOUT_S):
            answer = await small.collect()
            with pytest.raises(errors.OutOfRange, match="came back with room for"):
                await large.collect()
            [rest] = (await unlimited.collect()).completions
        assert rest.finish_reason == "length"
        assert rest.token_ids == reference_tokens(reference, prompt, len(rest.token_ids))
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 60)
        status = await client.status()
        assert status.num_free_blocks == status.num_blocks < before
    await router.close()
    await shard.close()


async def test_a_stage_that_answers_twice_loses_the_pipeline_and_does_not_hang_it(tiny_model, reference, monkeypatch):
    from stagecoach_shard.rpc import forward_stream

    deliver = forward_stream._deliver
    answered = []

    def once_twice(stage, session, header, result, times, on_sent):
        deliver(stage, session, header, result, times, on_sent)
        if not answered:
            answered.append(header.step)
            del header.timings[:]  # it is the step that is to be refused
            deliver(stage, session, header, result, times, lambda: None)

    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address])
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        monkeypatch.setattr(forward_stream, "_deliver", once_twice)
        async with asyncio.timeout(RESTART_TIMEOUT_S):
            answer = await client.generate(token_ids=[1, 2, 3], **greedy(6))
        assert answer.completions[0].token_ids == reference_tokens(reference, [1, 2, 3], 6)
        assert (await client.status()).pipelines[0].epoch == 2
    await router.close()
    await shard.close()


async def test_a_caller_that_does_not_read_is_cut_off(tiny_model, monkeypatch):
    from stagecoach_router.requests import output_stream

    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address])
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        monkeypatch.setattr(output_stream, "MAX_UNREAD_DELTAS", -1)
        with pytest.raises(errors.Overloaded, match="not being read"):
            await client.generate(token_ids=[1, 2, 3], **greedy(6))
        monkeypatch.undo()
        status = await client.status()
        assert (status.num_running, status.num_free_blocks) == (0, status.num_blocks)
    await router.close()
    await shard.close()


async def test_a_long_text_is_tokenized_off_the_event_loop_and_alike(tiny_model, monkeypatch):
    from stagecoach_router.text import prompt_encoder

    monkeypatch.setattr(prompt_encoder, "MAX_LENGTH_ON_LOOP", 100)
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address])
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        long, short = await asyncio.gather(client.tokenize("Hü! " * 100), client.tokenize("Hü! "))
        assert long.token_ids == short.token_ids * 100
        with pytest.raises(errors.OutOfRange) as caught:
            await client.tokenize("Hü! " * 200)
        assert (caught.value.field, caught.value.limit, caught.value.value) == ("prompt", "512", "1000")
    await router.close()
    await shard.close()


async def test_an_error_amid_a_step_loses_no_token_that_was_sampled_before_it(
    breakable, tiny_model, reference, monkeypatch
):
    client, _, _ = breakable
    prompts = random_prompts(4, 25)
    advance, num_tokens = StepLoop._advance, 0

    def advance_until(self, request, sequence, sampled):
        nonlocal num_tokens
        num_tokens += 1
        if num_tokens == 40:
            raise RuntimeError("unforeseen")
        return advance(self, request, sequence, sampled)

    monkeypatch.setattr(StepLoop, "_advance", advance_until)
    async with asyncio.timeout(RESTART_TIMEOUT_S):
        answers = await asyncio.gather(*(client.generate(token_ids=prompt, **greedy(30)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 30)
    assert (await client.status()).pipelines[0].epoch >= 2

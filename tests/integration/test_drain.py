"""Who is told to stop takes nothing new, finishes what it has, and then stops."""

import asyncio
import threading

import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stagecoach import errors
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.v1 import shard_pb2
from stagecoach_client import AsyncClient
from stagecoach_router.engine.replica import Replica
from stagecoach_router.pipelines.shard_registry import ShardRegistry
from stagecoach_router.text import prompt_encoder
from stagecoach_router.text.tokenizer import Tokenizer
from tests.cluster import free_port, start_router, start_shard, wait_until_ready
from tests.held_stage import held_stages
from tests.tiny_model import greedy, random_prompts, reference_tokens

# Longer than any of these tests: what ends earlier does so because it is done.
DRAIN_TIMEOUT_S = 60.0
TIMEOUT_S = 30.0


async def test_a_router_finishes_what_runs_and_refuses_what_comes(tiny_model, reference, monkeypatch):
    prompts = random_prompts(2, 20)
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address], drain_timeout_s=DRAIN_TIMEOUT_S)
    async with (
        AsyncClient(router.address, max_retries=0) as client,
        grpc.aio.insecure_channel(router.address) as channel,
        asyncio.timeout(TIMEOUT_S),
    ):
        await wait_until_ready(client, router, shard)
        with held_stages(monkeypatch) as goes_on:
            begun = {"token_ids": prompts[0], "request_id": "begun", "stream": True, **greedy(60)}
            stream = await client.generate(**begun)
            await anext(stream)
            goes_on.clear()
            router.stop.set()
            while True:
                status = (await HealthStub(channel).Check(HealthCheckRequest())).status
                if status == HealthCheckResponse.NOT_SERVING:
                    break
                await asyncio.sleep(0.01)
            with pytest.raises(errors.Unavailable, match="stopping") as refused:
                await client.generate(token_ids=prompts[1], **greedy(3))
            assert refused.value.retry_after_s > 0
            again = await client.generate(**begun)  # no new request: it is known
            goes_on.set()
            expected = reference_tokens(reference, prompts[0], 60)
            for each in (stream, again):
                assert (await each.collect()).completions[0].token_ids == expected
        await router.task
    await shard.close()


async def test_a_router_waits_for_a_request_whose_text_is_being_tokenized(tiny_model, monkeypatch):
    began, may_end, encode = threading.Event(), threading.Event(), Tokenizer.encode_within

    def held_up(self, *args):
        began.set()
        assert may_end.wait(TIMEOUT_S)
        return encode(self, *args)

    monkeypatch.setattr(Tokenizer, "encode_within", held_up)
    monkeypatch.setattr(prompt_encoder, "MAX_LENGTH_ON_LOOP", 0)
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address], drain_timeout_s=DRAIN_TIMEOUT_S)
    async with (
        AsyncClient(router.address, max_retries=0) as client,
        grpc.aio.insecure_channel(router.address) as channel,
        asyncio.timeout(TIMEOUT_S),
    ):
        await wait_until_ready(client, router, shard)
        answer = asyncio.create_task(client.generate("a" * 100, **greedy(3)))
        await asyncio.to_thread(began.wait, TIMEOUT_S)
        router.stop.set()
        while (await HealthStub(channel).Check(HealthCheckRequest())).status == HealthCheckResponse.SERVING:
            await asyncio.sleep(0.01)
        may_end.set()
        assert len((await answer).completions[0].token_ids) == 3
        await router.task
    await shard.close()


async def test_a_router_whose_requests_do_not_end_in_time_stops_all_the_same(tiny_model, monkeypatch):
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address], drain_timeout_s=0.2)
    async with AsyncClient(router.address, max_retries=0) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router, shard)
        with held_stages(monkeypatch) as goes_on:
            stream = await client.generate(token_ids=[1, 2, 3], stream=True, **greedy(400))
            await anext(stream)
            goes_on.clear()
            router.stop.set()
            with pytest.raises(errors.Unavailable, match="stopping"):
                await stream.collect()
            goes_on.set()
            await router.task
    await shard.close()


async def test_a_router_that_fails_while_it_drains_says_so(tiny_model, monkeypatch):
    async def fail(registry, shard):
        raise RuntimeError("a bug")

    monkeypatch.setattr("stagecoach_router.pipelines.pipeline_manager.START_PATIENCE_S", 0.0)
    shard = start_shard(tiny_model, "0:4")
    absent = f"127.0.0.1:{free_port()}"  # which is asked again and again
    router = start_router([shard.address, absent], drain_timeout_s=DRAIN_TIMEOUT_S)
    async with AsyncClient(router.address, max_retries=0) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router, shard)
        with held_stages(monkeypatch) as goes_on:
            stream = await client.generate(token_ids=[1, 2, 3], stream=True, **greedy(400))
            await anext(stream)
            goes_on.clear()
            router.stop.set()
            monkeypatch.setattr(ShardRegistry, "_ask", fail)
            with pytest.raises(RuntimeError, match="a bug"):
                await router.task
            with pytest.raises(errors.Unavailable):
                await stream.collect()
    await shard.close()


async def test_a_shard_serves_the_leases_it_has_and_opens_no_more(tiny_model, reference, monkeypatch):
    prompt = random_prompts(1, 20)[0]
    shard = start_shard(tiny_model, "0:4", drain_timeout_s=DRAIN_TIMEOUT_S)
    router = start_router([shard.address], kv_blocks=32)
    async with AsyncClient(router.address, max_retries=0) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router, shard)
        with held_stages(monkeypatch) as goes_on:
            stream = await client.generate(token_ids=prompt, stream=True, **greedy(60))
            await anext(stream)
            goes_on.clear()
            shard.stop.set()
            other = start_router([shard.address], kv_blocks=32)
            async with AsyncClient(other.address, max_retries=4) as newcomer:
                while "the shard is stopping" not in str((await newcomer.status()).pipelines[0].reason):
                    await asyncio.sleep(0.01)
            await other.close()
            async with grpc.aio.insecure_channel(shard.address) as channel:
                with pytest.raises(grpc.RpcError) as described:
                    await ShardStub(channel).describe(shard_pb2.DescribeRequest())
                error = errors.from_rpc_error(described.value, "shard")
                assert (type(error), error.message) == (errors.Unavailable, "the shard is stopping")
                assert error.retry_after_s > 0
            goes_on.set()
            answer = await stream.collect()
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 60)
        later = await client.generate(token_ids=prompt, **greedy(3))
        assert later.completions[0].token_ids == answer.completions[0].token_ids[:3]
        assert not shard.task.done()
        await router.close()
        await shard.task


async def test_a_shard_whose_lease_does_not_end_in_time_tells_its_router(tiny_model, monkeypatch):
    losses = []
    pipeline_lost = Replica.pipeline_lost

    def hear(replica, error):
        losses.append(type(error))
        pipeline_lost(replica, error)

    monkeypatch.setattr(Replica, "pipeline_lost", hear)
    shard = start_shard(tiny_model, "0:4", drain_timeout_s=0.2)
    router = start_router([shard.address])
    async with AsyncClient(router.address, max_retries=0) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router, shard)
        await shard.close()
        while (await client.status()).ready:
            await asyncio.sleep(0.01)
    assert losses == [errors.ShardStopping]
    await router.close()

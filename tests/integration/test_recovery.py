"""A pipeline that breaks comes back, and the streams on it go on where they were."""

import asyncio

import pytest
import torch

from stagecoach import errors
from stagecoach_client import AsyncClient
from tests.cluster import start_router, start_shard, wait_until_ready
from tests.integration.test_generate import greedy, random_prompts, reference_tokens

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


async def test_a_shard_that_computes_nonsense_is_a_fault_and_not_a_token(tiny_model, monkeypatch):
    from stagecoach_shard.stage import Stage

    async def ask():
        shard = start_shard(tiny_model, "0:4")
        router = start_router([shard.address], recovery_timeout_s=0.3)
        async with AsyncClient(router.address, max_retries=0) as client:
            await wait_until_ready(client, router, shard)
            monkeypatch.setattr(Stage, "logits", lambda self, hidden: torch.full((len(hidden), 260), float("nan")))
            try:
                return await client.generate(token_ids=[1, 2, 3], **greedy(4))
            finally:
                monkeypatch.undo()
                await router.close()
                await shard.close()

    with pytest.raises(errors.ShardFault, match="lost 4 times"):
        async with asyncio.timeout(RESTART_TIMEOUT_S):
            await ask()

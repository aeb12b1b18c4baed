"""More shards than one pipeline needs: replicas of a range, further pipelines, and shards that load what is missing."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from stagecoach import errors
from stagecoach_client import AsyncClient
from tests.cluster import free_port, start_router, start_shard, status_becomes, wait_until_ready
from tests.tiny_model import greedy, random_prompts, reference_tokens

TIMEOUT_S = 60.0
OUTPUT_TOKENS = 120


@asynccontextmanager
async def shards_and_router(model, ranges, **router_settings):
    """A client, and the shards by their index in `ranges`, of which tests may close and start some."""
    shards = [start_shard(model, layers) for layers in ranges]
    router = start_router([shard.address for shard in shards], recovery_timeout_s=20.0, **router_settings)
    client = AsyncClient(router.address, max_retries=0)
    try:
        await wait_until_ready(client, router, *shards)
        yield client, shards
    finally:
        await client.aclose()
        for server in (router, *shards):
            await server.close()


def addresses(pipeline):
    return [stage.address for stage in pipeline.stages]


async def started_streams(client, num_streams):
    """Prompts and their streams; each has had a token."""
    prompts = random_prompts(num_streams, 25)
    streams = [await client.generate(token_ids=prompt, stream=True, **greedy(OUTPUT_TOKENS)) for prompt in prompts]
    for stream in streams:
        await anext(stream)
    return prompts, streams


async def all_end_exactly(reference, prompts, streams):
    async with asyncio.timeout(TIMEOUT_S):
        answers = await asyncio.gather(*(stream.collect() for stream in streams))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, OUTPUT_TOKENS)


@pytest.mark.parametrize("spare", ["2:4", "auto"], ids=["of the same range", "without layers"])
async def test_a_spare_takes_the_place_of_a_lost_stage(tiny_model, reference, spare):
    async with shards_and_router(tiny_model, ["0:2", "2:4", spare]) as (client, shards):
        before = await client.status()
        [stage] = before.spares
        used, unused = (1, 2) if stage.address == shards[2].address else (2, 1)
        prompts, streams = await started_streams(client, 6)
        await shards[used].close()
        await all_end_exactly(reference, prompts, streams)
        status = await client.status()
        assert [addresses(pipeline) for pipeline in status.pipelines] == [[shards[0].address, shards[unused].address]]
        assert status.pipelines[0].epoch > before.pipelines[0].epoch
        assert status.num_free_blocks == status.num_blocks
        [gone] = status.spares
        assert gone.address == shards[used].address
        assert "refused" in gone.reason or "connect" in gone.reason


async def test_spares_load_ahead_what_serves_and_are_there_at_once(tiny_model, reference):
    """Also the ranges in use, however even or uneven: nothing is split anew."""
    async with shards_and_router(tiny_model, ["0:1", "1:4", "auto", "auto"]) as (client, shards):
        status = await status_becomes(client, lambda now: all(spare.has_layers for spare in now.spares))
        held = {(spare.first_layer, spare.end_layer): spare.address for spare in status.spares}
        assert set(held) == {(0, 1), (1, 4)}
        assert len(status.pipelines) == 1, "they stand by"
        prompts, streams = await started_streams(client, 4)
        await shards[1].close()
        await all_end_exactly(reference, prompts, streams)
        status = await client.status()
        first, last = addresses(status.pipelines[0])
        assert last == held[1, 4], "the one that had them already"
        # Whoever says first that it is there: the stage that was not lost, or the spare that has the same layers.
        assert first in (shards[0].address, held[0, 1])
        assert {(spare.first_layer, spare.end_layer) for spare in status.spares if spare.has_layers} <= {(0, 1)}


async def test_a_shard_that_comes_back_stands_by_for_the_one_that_took_its_place(tiny_model, reference):
    async with shards_and_router(tiny_model, ["0:2", "2:4", "auto"]) as (client, shards):
        first, fixed, auto = shards
        await fixed.close()
        status = await status_becomes(client, lambda now: now.ready and auto.address in addresses(now.pipelines[0]))
        shards[1] = start_shard(tiny_model, "2:4", listen=fixed.address)
        status = await status_becomes(client, lambda now: now.spares[0].has_layers)
        assert addresses(status.pipelines[0]) == [first.address, auto.address], "what serves is left alone"
        prompts, streams = await started_streams(client, 3)
        await auto.close()
        await all_end_exactly(reference, prompts, streams)
        status = await client.status()
        assert addresses(status.pipelines[0]) == [first.address, fixed.address]


async def test_requests_move_to_another_pipeline_and_the_router_stays_ready(tiny_model, reference):
    async with shards_and_router(tiny_model, ["0:2", "2:4", "0:1", "1:4"]) as (client, shards):
        await status_becomes(client, lambda now: now.num_ready == 2)
        prompts, streams = await started_streams(client, 8)
        status = await client.status()
        assert [pipeline.num_running for pipeline in status.pipelines] == [4, 4]
        assert sorted(address for pipeline in status.pipelines for address in addresses(pipeline)) == sorted(
            shard.address for shard in shards
        )
        await shards[1].close()
        await all_end_exactly(reference, prompts, streams)
        status = await client.status()
        assert status.ready
        assert [pipeline.ready for pipeline in status.pipelines].count(True) == 1
        assert all(pipeline.reason for pipeline in status.pipelines if not pipeline.ready)
        shards[1] = start_shard(tiny_model, "2:4", listen=shards[1].address)
        status = await status_becomes(client, lambda now: now.num_ready == 2)
        assert len(status.pipelines) == 2
        assert status.num_free_blocks == status.num_blocks


async def test_what_two_broken_pipelines_have_left_makes_one(tiny_model, reference):
    async with shards_and_router(tiny_model, ["0:2", "2:4", "0:2", "2:4"]) as (client, shards):
        status = await status_becomes(client, lambda now: now.num_ready == 2)
        by_address = {shard.address: shard for shard in shards}
        one, other = [[by_address[address] for address in addresses(pipeline)] for pipeline in status.pipelines]
        prompts, streams = await started_streams(client, 6)
        await asyncio.gather(one[0].close(), other[1].close())
        await all_end_exactly(reference, prompts, streams)
        status = await client.status()
        assert status.num_ready == 1
        [serving] = [pipeline for pipeline in status.pipelines if pipeline.ready]
        assert addresses(serving) == [other[0].address, one[1].address]


async def test_shards_without_layers_make_as_many_pipelines_as_are_wanted(tiny_model, reference):
    async with shards_and_router(tiny_model, ["auto"] * 5, stages=2, replicas=2) as (client, shards):
        status = await status_becomes(client, lambda now: now.num_ready == 2)
        for pipeline in status.pipelines:
            ranges = [(stage.first_layer, stage.end_layer) for stage in pipeline.stages]
            assert [ranges[0][0], ranges[-1][1], len(ranges)] == [0, 4, 2]
        # The fifth makes no third one, though it loads layers ahead.
        status = await status_becomes(client, lambda now: any(spare.has_layers for spare in now.spares))
        [spare] = status.spares
        assert (spare.assignable, spare.reason, len(status.pipelines)) == (True, "", 2)
        prompts, streams = await started_streams(client, 4)
        by_address = {shard.address: shard for shard in shards}
        await by_address[addresses(status.pipelines[0])[1]].close()
        await all_end_exactly(reference, prompts, streams)
        await status_becomes(client, lambda now: now.num_ready == 2)


async def test_all_shards_without_layers_make_one_pipeline_where_nothing_else_is_said(tiny_model, reference):
    async with shards_and_router(tiny_model, ["auto", "auto"]) as (client, _):
        [pipeline] = (await client.status()).pipelines
        assert len(pipeline.stages) == 2
        prompts, streams = await started_streams(client, 2)
        await all_end_exactly(reference, prompts, streams)


async def test_one_shard_does_not_take_over_what_was_split_over_two(tiny_model):
    """It may not have the memory, and the other one may be back in a moment."""
    async with shards_and_router(tiny_model, ["auto", "auto"]) as (client, shards):
        [pipeline] = (await client.status()).pipelines
        by_address = {shard.address: shard for shard in shards}
        kept, lost = (by_address[address] for address in addresses(pipeline))
        held = (pipeline.stages[0].first_layer, pipeline.stages[0].end_layer)
        await lost.close()
        status = await status_becomes(client, lambda now: any(spare.has_layers for spare in now.spares))
        assert not status.ready
        again = start_shard(tiny_model, "auto", listen=lost.address)
        shards[shards.index(lost)] = again
        status = await status_becomes(client, lambda now: now.ready)
        assert addresses(status.pipelines[0]) == [kept.address, lost.address]
        assert (status.pipelines[0].stages[0].first_layer, status.pipelines[0].stages[0].end_layer) == held


async def test_a_shard_of_another_model_is_left_out_once_there_is_a_pipeline(tiny_model, other_model):
    async with shards_and_router(tiny_model, ["0:2", "2:4", "2:4"]) as (client, shards):
        spare = (await client.status()).spares[0].address
        index = next(index for index, shard in enumerate(shards) if shard.address == spare)
        await shards[index].close()
        shards[index] = start_shard(other_model, "2:4", listen=spare)
        status = await status_becomes(client, lambda now: "fingerprint" in now.spares[0].reason)
        assert status.ready


async def test_shards_of_different_models_are_an_error_before_there_is_a_pipeline(tiny_model, other_model):
    shards = [start_shard(tiny_model, "0:2"), start_shard(other_model, "2:4")]
    router = start_router([shard.address for shard in shards])
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(errors.ModelMismatch, match="fingerprint"):
            await router.task
    for shard in shards:
        await shard.close()


async def test_fewer_lanes_than_stages_are_refused(tiny_model):
    shards = [start_shard(tiny_model, layers) for layers in ("0:2", "2:4")]
    router = start_router([shard.address for shard in shards], lanes=1)
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(errors.ConfigError, match="lanes: 1 would leave some of 2 stages idle"):
            await router.task
    for shard in shards:
        await shard.close()


async def test_shards_without_layers_that_come_late_are_waited_for(tiny_model, reference, monkeypatch):
    """As when machines start one after the other: nothing is decided, and nothing given up, before all are there."""
    monkeypatch.setattr("stagecoach_router.pipelines.pipeline_manager.FIND_TIMEOUT_S", 0.1)
    first = start_shard(tiny_model, "auto")
    late_address = f"127.0.0.1:{free_port()}"
    router = start_router([first.address, late_address])
    async with AsyncClient(router.address, max_retries=0) as client:
        await status_becomes(client, lambda now: late_address in now.pipelines[0].reason)
        await asyncio.sleep(0.5)  # several attempts that come to nothing
        late = start_shard(tiny_model, "auto", listen=late_address)
        await wait_until_ready(client, router, first, late)
        [pipeline] = (await client.status()).pipelines
        assert len(pipeline.stages) == 2
    for server in (router, first, late):
        await server.close()

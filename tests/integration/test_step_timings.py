"""A real pipeline of three stages: every frame takes the fast path, and every step says where its time went."""

import asyncio
import contextlib
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from stagecoach import errors
from stagecoach_client import AsyncClient
from stagecoach_client.activity import activity
from stagecoach_router.metrics.counters import PipelineTotals
from stagecoach_router.pipelines.pipeline import Pipeline, PipelineContext
from stagecoach_router.pipelines.shard_client import describe
from tests.cluster import cluster, start_router, start_shard, wait_until_ready
from tests.integration.test_shard_service import micro_batch
from tests.tiny_model import greedy, random_prompts

TIMEOUT_S = 20.0
RANGES = ("0:1", "1:3", "3:4")


@asynccontextmanager
async def three_shards(model):
    shards = [start_shard(model, layers) for layers in RANGES]
    try:
        yield [shard.address for shard in shards]
    finally:
        for shard in shards:
            await shard.close()


async def discovered(addresses):
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return [await describe(address) for address in addresses]
            except errors.Unavailable:  # it loads
                await asyncio.sleep(0.02)


@asynccontextmanager
async def opened(addresses, totals, *, epoch=1):
    """A pipeline, and the results and losses that it delivers, in order."""
    delivered = asyncio.Queue()
    listener = SimpleNamespace(
        result_came=lambda result, payload: delivered.put_nowait(result), pipeline_lost=delivered.put_nowait
    )
    pipeline = Pipeline(await discovered(addresses), epoch, listener, PipelineContext(lease_id=77, totals=totals))
    await pipeline.open(num_blocks=8, max_slots=4)
    try:
        yield pipeline, delivered
    finally:
        await pipeline.close()


async def run_steps(pipeline, delivered, *, epoch=1):
    """Three steps, sent together; their results."""
    for step in (1, 2, 3):
        pipeline.send(micro_batch([5, 6, 7], step=step, epoch=epoch))
    async with asyncio.timeout(TIMEOUT_S):
        return [await delivered.get() for _ in range(3)]


async def test_a_result_has_a_timing_for_each_stage_in_order_also_after_a_reopening(tiny_model):
    totals = PipelineTotals()
    async with three_shards(tiny_model) as addresses:
        for epoch in (1, 2):
            async with opened(addresses, totals, epoch=epoch) as (pipeline, delivered):
                results = await run_steps(pipeline, delivered, epoch=epoch)
                await pipeline.refresh_loads(TIMEOUT_S)
                if epoch == 1:
                    first = results
        assert [result.step for result in results] == [1, 2, 3]
        for result in (*first, *results):
            assert len(result.timings) == 3
            assert all(timing.decode_s > 0 and timing.compute_s > 0 for timing in result.timings)
        # In order: each stage's own times add up to what that stage reports.
        for index, address in enumerate(addresses):
            timings = [result.timings[index] for result in (*first, *results)]
            stage = totals.stage(address).counters
            assert stage.num_steps == 6
            for name in ("decode_s", "queue_s", "compute_s"):
                assert sum(getattr(timing, name) for timing in timings) == pytest.approx(getattr(stage, name), rel=1e-4)


async def test_steps_that_arrive_together_queue(tiny_model):
    async with three_shards(tiny_model) as addresses, opened(addresses, PipelineTotals()) as (pipeline, delivered):
        results = await run_steps(pipeline, delivered)
        assert results[2].timings[0].queue_s > 0


async def test_every_frame_takes_the_fast_path_at_every_stage_and_at_the_router(tiny_model):
    async with cluster(tiny_model, RANGES) as client:
        prompts = random_prompts(6, 20)
        sampled = {"seed": 3, "max_tokens": 12, "ignore_eos": True}
        await asyncio.gather(
            *(client.generate(token_ids=prompt, **greedy(12)) for prompt in prompts[:3]),
            *(client.generate(token_ids=prompt, top_k=5, **sampled) for prompt in prompts[3:5]),
            client.generate(token_ids=prompts[5], **sampled),
        )
        status = await client.status()
    assert status.num_results > 0
    for stage in status.pipelines[0].stages:
        assert stage.num_fast_frames == stage.num_frames == stage.num_steps == status.num_results
    assert status.num_fast_frames == status.num_frames > status.num_results


async def test_the_status_is_of_now_and_its_counters_outlive_a_shard(tiny_model):
    shards = [start_shard(tiny_model, layers) for layers in RANGES]
    addresses = [shard.address for shard in shards]
    router = start_router(addresses, recovery_timeout_s=20.0, probe_interval_s=3600.0)
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, *shards)
        prompt = random_prompts(1, 20)[0]
        before = await client.status()
        await client.generate(token_ids=prompt, **greedy(8))
        first = await client.status()
        done = activity(first, before)
        assert [stage.num_tokens for stage in done.stages] == [20 + 7] * 3
        assert first.active_s > 0
        assert all(0 < stage.bubble_fraction < 1 for stage in done.stages)
        assert done.result_payload_bytes_per_token == 8  # one id and its logit
        assert done.prefix_hit_fraction == 0

        await shards[1].close()
        shards[1] = start_shard(tiny_model, RANGES[1], listen=shards[1].address)
        async with asyncio.timeout(TIMEOUT_S):
            while (await client.status()).pipelines[0].epoch < 2:
                await asyncio.sleep(0.02)
        await wait_until_ready(client, router, *shards)
        await client.generate(token_ids=prompt, **greedy(8))
        second = await client.status()
        done = activity(second, first)
        assert [stage.num_tokens for stage in done.stages] == [1 + 20 + 7] * 3  # a probe came first
        assert second.active_s > first.active_s
        # Nothing runs, so nothing becomes active.
        assert (await client.status()).active_s == second.active_s
    for server in (router, *shards):
        await server.close()


async def test_callers_that_do_not_wait_for_the_status_harm_nothing(tiny_model):
    async with cluster(tiny_model, RANGES) as client:
        for delay_s in (0.0, 0.0005, 0.001, 0.002, 0.005) * 4:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await client.status()
        status = await client.status()
        assert status.ready
        assert status.pipelines[0].epoch == 1

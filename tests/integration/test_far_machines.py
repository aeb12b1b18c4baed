"""A pipeline whose machines are far from each other, and what stands in for the distance."""

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from stagecoach_client import AsyncClient
from stagecoach_router import server
from stagecoach_router.engine.engine import Engine
from tests.cluster import start_router, start_shard, wait_until_ready
from tests.delay_proxy import DelayProxy

DELAY_S = 0.015
NUM_HOPS = 3  # router, two stages, router
OUTPUT_TOKENS = 24


@asynccontextmanager
async def far_cluster(model, delay_s):
    """A client, and the proxies before the two shards: all that goes to or from a shard passes its proxy."""
    async with AsyncExitStack() as stack:
        shards = [start_shard(model, layers) for layers in ("0:2", "2:4")]
        for server in shards:
            stack.push_async_callback(server.close)
        proxies = [await stack.enter_async_context(DelayProxy(shard.address, delay_s=delay_s)) for shard in shards]
        router = start_router([proxy.address for proxy in proxies])
        stack.push_async_callback(router.close)
        client = await stack.enter_async_context(AsyncClient(router.address, max_retries=0))
        await wait_until_ready(client, router, *shards)
        yield client, proxies


async def generate(client, prompt):
    generation = await client.generate(prompt, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    return generation.completions[0].token_ids


async def test_distance_changes_no_token_and_each_token_pays_each_hop(tiny_model):
    prompts = [f"Prompt number {number} is this long: {'x' * 9 * number}" for number in range(8)]
    async with far_cluster(tiny_model, 0.0) as (client, _):
        near = await asyncio.gather(*(generate(client, prompt) for prompt in prompts))
    async with far_cluster(tiny_model, DELAY_S) as (client, _):
        far = await asyncio.gather(*(generate(client, prompt) for prompt in prompts))
        begin = time.monotonic()
        assert await generate(client, prompts[0]) == near[0]
        assert time.monotonic() - begin >= OUTPUT_TOKENS * NUM_HOPS * DELAY_S, "something went past the proxies"
    assert far == near


async def test_the_router_learns_the_distance_and_keeps_more_steps_in_flight(tiny_model, monkeypatch):
    engines = []

    def make_and_remember(*arguments, **options):
        engines.append(Engine(*arguments, **options))
        return engines[-1]

    monkeypatch.setattr(server, "Engine", make_and_remember)
    prompts = [f"Prompt number {number}" for number in range(8)]
    async with far_cluster(tiny_model, DELAY_S) as (client, _):
        for _ in range(2):
            await asyncio.gather(*(generate(client, prompt) for prompt in prompts))
        pacing = engines[0].replicas[0].scheduler.pacing
        assert pacing.token_s() >= NUM_HOPS * DELAY_S
        assert pacing.pace(8).num_lanes > 2


async def test_a_stalled_direction_loses_nothing(tiny_model):
    async with far_cluster(tiny_model, 0.0) as (client, proxies):
        expected = await generate(client, "Once")
        proxies[1].stall("from_target")
        generation = asyncio.create_task(generate(client, "Once"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(generation), 0.2)
        proxies[1].resume("from_target")
        async with asyncio.timeout(30):
            assert await generation == expected


async def test_proxy_keeps_order_and_ends_what_ended():
    async def echo(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(30), DelayProxy(target, delay_s=0.05) as proxy:
        reader, writer = await asyncio.open_connection(*proxy.address.split(":"))
        data = bytes(range(256)) * 20_000
        begin = time.monotonic()
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == data
        assert time.monotonic() - begin >= 2 * 0.05
        writer.close()
    server.close()

"""Two routers on the same shards: what one sends is no fault of the other's pipeline."""

import asyncio
import threading
from contextlib import AsyncExitStack

from stagecoach_client import AsyncClient
from stagecoach_shard.runtime.stage import Stage
from tests.cluster import start_router, start_shard, wait_until_ready
from tests.tiny_model import greedy, random_prompts, reference_tokens

TIMEOUT_S = 60.0
FAULT_TIMEOUT_S = 1.0
LONG_TOKENS = 24  # a chunk of so many tokens is one of the other router's
LONG_S = 2.5  # more than twice what a step may take to get on


async def test_another_routers_long_prompts_are_no_fault(tiny_model, reference, monkeypatch):
    """Each of its chunks takes a stage longer than our fault timeout, and our steps wait behind it."""
    ours, theirs = random_prompts(1, 8)[0], random_prompts(2, 120, seed=1)
    forward, begun, never = Stage.forward, threading.Event(), threading.Event()
    num_long = 0

    def slowly(self, inputs, batch, cache):
        nonlocal num_long
        if batch.total_tokens >= LONG_TOKENS:
            num_long += 1
            begun.set()
            never.wait(LONG_S)
        return forward(self, inputs, batch, cache)

    async with AsyncExitStack() as stack:
        shards = [start_shard(tiny_model, layers) for layers in ("0:2", "2:4")]
        for shard in shards:
            stack.push_async_callback(shard.close)
        addresses = [shard.address for shard in shards]
        clients = []
        for settings in ({"fault_timeout_s": FAULT_TIMEOUT_S}, {}):
            router = start_router(addresses, kv_blocks=200, **settings)
            stack.push_async_callback(router.close)
            clients.append(await stack.enter_async_context(AsyncClient(router.address, max_retries=0)))
            await wait_until_ready(clients[-1], router, *shards)
        impatient, busy = clients
        async with asyncio.timeout(TIMEOUT_S):
            await impatient.generate(token_ids=ours, **greedy(20))  # so that it is known what our steps take
            monkeypatch.setattr(Stage, "forward", slowly)
            long = [asyncio.ensure_future(busy.generate(token_ids=prompt, **greedy(2))) for prompt in theirs]
            assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
            answer = await impatient.generate(token_ids=ours, **greedy(4))
            await asyncio.gather(*long)
        assert num_long >= 4
        assert answer.completions[0].token_ids == reference_tokens(reference, ours, 4)
        for client in clients:
            assert (await client.status()).pipelines[0].epoch == 1

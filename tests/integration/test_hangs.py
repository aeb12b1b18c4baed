"""A stage that hangs or is cut off is found, and its streams go on where they were; what it says later harms nobody."""

import asyncio
import threading
from contextlib import AsyncExitStack, asynccontextmanager

import grpc.aio
import pytest

from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_client import AsyncClient
from tests.cluster import start_router, start_shard, status_becomes, wait_until_ready
from tests.delay_proxy import DelayProxy
from tests.integration.test_shard_service import open_session, read_kind, running_shard
from tests.tiny_model import greedy, random_prompts, reference_tokens

FAULT_TIMEOUT_S = 1.0
TIMEOUT_S = 60.0
NUM_STREAMS = 8
OUTPUT_TOKENS = 120
KV_BLOCKS = 200  # more than half of what a shard has: two leases do not fit


@asynccontextmanager
async def proxied_cluster(model, **router_settings):
    """A client, the router, and the proxies before the two shards: all that goes to or from a shard passes its own."""
    settings = {"fault_timeout_s": FAULT_TIMEOUT_S, "probe_interval_s": 0.2, "kv_blocks": KV_BLOCKS} | router_settings
    async with AsyncExitStack() as stack:
        shards = [start_shard(model, layers, kv_cache_memory="4M") for layers in ("0:2", "2:4")]
        for server in shards:
            stack.push_async_callback(server.close)
        proxies = [await stack.enter_async_context(DelayProxy(shard.address)) for shard in shards]
        router = start_router([proxy.address for proxy in proxies], **settings)
        stack.push_async_callback(router.close)
        client = await stack.enter_async_context(AsyncClient(router.address, max_retries=0))
        await wait_until_ready(client, router, *shards)
        yield client, proxies, shards


@pytest.mark.parametrize("direction", ["to_target", "from_target"])
@pytest.mark.parametrize("cut", [0, 1], ids=["first stage", "last stage"])
async def test_streams_survive_a_stage_that_is_cut_off_in_one_direction(tiny_model, reference, cut, direction):
    prompts = random_prompts(NUM_STREAMS, 25)
    async with proxied_cluster(tiny_model) as (client, proxies, _):
        sampled = {"token_ids": prompts[0], "seed": 5, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        undisturbed = await client.generate(**sampled)
        streams = [
            await client.generate(token_ids=prompt, stream=True, **greedy(OUTPUT_TOKENS)) for prompt in prompts[1:]
        ]
        streams.append(await client.generate(stream=True, **sampled))
        async with asyncio.timeout(TIMEOUT_S):
            for stream in streams:
                await anext(stream)
            proxies[cut].stall(direction)
            await status_becomes(client, lambda status: not status.ready)
            proxies[cut].resume(direction)
            answers = await asyncio.gather(*(stream.collect() for stream in streams))
        for prompt, answer in zip(prompts[1:], answers, strict=False):
            assert answer.completions[0].token_ids == reference_tokens(reference, prompt, OUTPUT_TOKENS)
        assert answers[-1].completions[0].token_ids == undisturbed.completions[0].token_ids
        status = await status_becomes(client, lambda status: status.ready)
        assert status.pipelines[0].epoch >= 2
        assert status.num_free_blocks == status.num_blocks == KV_BLOCKS


async def test_an_idle_pipeline_that_is_cut_between_its_stages_is_not_ready_and_then_ready_again(tiny_model):
    async with proxied_cluster(tiny_model) as (client, proxies, _):
        for direction in ("to_target", "from_target"):
            proxies[1].stall(direction)
        await status_becomes(client, lambda status: not status.ready)
        for direction in ("to_target", "from_target"):
            proxies[1].resume(direction)
        await status_becomes(client, lambda status: status.ready)
        answer = await client.generate(token_ids=[1, 2, 3], **greedy(4))
        assert answer.usage.completion_tokens == 4


async def test_a_compute_thread_that_hangs_while_nobody_asks_is_found(tiny_model, monkeypatch):
    """Its event loop answers all the time: only a probe finds it."""
    from stagecoach_shard.runtime.stage import Stage

    forward = Stage.forward
    let_go = threading.Event()

    def hang(self, *arguments):
        let_go.wait(TIMEOUT_S)
        return forward(self, *arguments)

    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address], fault_timeout_s=0.5, step_timeout_s=0.5, probe_interval_s=0.1)
    try:
        async with AsyncClient(router.address, max_retries=0) as client:
            await wait_until_ready(client, router, shard)
            before = await client.status()
            monkeypatch.setattr(Stage, "forward", hang)
            await status_becomes(client, lambda status: not status.ready)
            monkeypatch.undo()
            let_go.set()
            await status_becomes(client, lambda status: status.ready)
            answer = await client.generate(token_ids=[1, 2, 3], **greedy(4))
            after = await client.status()
        assert answer.usage.completion_tokens == 4
        assert after.num_finished == before.num_finished + 1
        assert after.completion_tokens == before.completion_tokens + 4
    finally:
        let_go.set()
        await router.close()
        await shard.close()


async def test_a_full_cache_does_not_make_a_health_probe_fail(tiny_model):
    """One sequence may fill every block that requests can have; the pipeline stays ready before, while and after."""
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address], kv_blocks=4, probe_interval_s=0.05)
    try:
        async with AsyncClient(router.address, max_retries=0) as client:
            await wait_until_ready(client, router, shard)
            await client.generate(token_ids=[7] * 40, **greedy(24))
            results = (await client.status()).num_results
            async with asyncio.timeout(TIMEOUT_S):
                while (status := await client.status()).num_results < results + 3:
                    assert status.ready
                    await asyncio.sleep(0.02)
            assert status.num_free_blocks == status.num_blocks == 4
            assert status.pipelines[0].epoch == 1
    finally:
        await router.close()
        await shard.close()


async def free_blocks_become(stub, expected):
    async with asyncio.timeout(TIMEOUT_S):
        while (await stub.describe(pb.DescribeRequest())).num_free_blocks != expected:
            await asyncio.sleep(0.02)


async def test_the_lease_of_a_router_that_falls_silent_ends(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        call = await open_session(stub, description, silence_timeout_s=0.5)
        await call.write(pb.SessionRequest(report_load=pb.ReportLoad(number=1)))
        assert (await stub.describe(pb.DescribeRequest())).num_free_blocks < description.num_blocks
        await free_blocks_become(stub, description.num_blocks)
        call.cancel()


async def test_the_lease_of_a_router_whose_other_stages_open_slowly_does_not_end(tiny_model):
    """It asks for the first time when all of them are open."""
    async with running_shard(tiny_model) as (stub, description):
        call = await open_session(stub, description, silence_timeout_s=0.1)
        for _ in range(3):  # which come once a second
            await read_kind(call, "load")
        await call.write(pb.SessionRequest(report_load=pb.ReportLoad(number=1)))
        load, _ = await read_kind(call, "load")
        while load.number != 1:
            load, _ = await read_kind(call, "load")
        await free_blocks_become(stub, description.num_blocks)  # and from then on it is in a hurry
        call.cancel()


async def test_the_lease_of_a_router_that_reads_nothing_ends_too(tiny_model):
    """A write to it hangs, and must not keep the lease alive."""
    shard = start_shard(tiny_model, "0:4")
    try:
        async with DelayProxy(shard.address) as proxy, grpc.aio.insecure_channel(shard.address) as direct:
            stub = ShardStub(direct)
            from tests.integration.test_shard_service import loaded

            description = await loaded(stub)
            async with grpc.aio.insecure_channel(proxy.address) as through_proxy:
                call = await open_session(ShardStub(through_proxy), description, silence_timeout_s=0.5)
                await call.write(pb.SessionRequest(report_load=pb.ReportLoad(number=1)))
                await read_kind(call, "load")
                assert (await stub.describe(pb.DescribeRequest())).num_free_blocks < description.num_blocks
                proxy.stall("from_target")
                proxy.stall("to_target")
                await free_blocks_become(stub, description.num_blocks)
                call.cancel()
    finally:
        await shard.close()


async def test_a_router_that_asks_regularly_keeps_its_lease(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        call = await open_session(stub, description, silence_timeout_s=1.0)
        loop = asyncio.get_running_loop()
        until = loop.time() + 2.5
        number = 0
        while loop.time() < until:
            number += 1
            await call.write(pb.SessionRequest(report_load=pb.ReportLoad(number=number)))
            await asyncio.sleep(0.1)
        assert (await stub.describe(pb.DescribeRequest())).num_free_blocks < description.num_blocks
        call.cancel()


async def test_what_the_own_former_lease_holds_counts_as_free(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        call = await open_session(stub, description, lease_id=77, num_blocks=description.num_blocks)
        free = [
            (await stub.describe(pb.DescribeRequest(lease_id=lease_id))).num_free_blocks for lease_id in (0, 77, 78)
        ]
        assert free == [0, description.num_blocks, 0]
        call.cancel()


@pytest.mark.parametrize("timeout_s", [-1.0, 1e-6, float("nan"), float("inf")])
async def test_a_silence_timeout_that_cannot_be_is_refused(tiny_model, timeout_s):
    from stagecoach.errors import InvalidArgument
    from tests.integration.test_shard_service import open_request, refusal

    async with running_shard(tiny_model) as (stub, description):
        call = stub.session()
        await call.write(open_request(description, silence_timeout_s=timeout_s))
        error = await refusal(call)
        assert isinstance(error, InvalidArgument)
        assert error.field == "silence_timeout_s"

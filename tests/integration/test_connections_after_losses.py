"""A lost pipeline leaves no connection behind, not even until the next garbage collection."""

import gc

import grpc.aio
import pytest

from stagecoach_client import AsyncClient
from tests.cluster import free_port, start_router, start_shard, wait_until_ready

NUM_LOSSES = 3


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def num_streams():
    """Sessions and streams of micro-batches, running or ended, that keep a connection open."""
    return sum(issubclass(type(thing), grpc.aio.StreamStreamCall) for thing in gc.get_objects())


async def test_each_loss_ends_the_connections_of_the_surviving_stage(tiny_model, no_garbage_collection):
    first = start_shard(tiny_model, "0:2")
    last_address = f"127.0.0.1:{free_port()}"
    last = start_shard(tiny_model, "2:4", listen=last_address)
    router = start_router([first.address, last_address])
    async with AsyncClient(router.address) as client:
        await wait_until_ready(client, router, first, last)
        counts = []
        for _ in range(NUM_LOSSES):
            await last.close()
            last = start_shard(tiny_model, "2:4", listen=last_address)
            answer = await client.generate("Hello", max_tokens=3, ignore_eos=True)
            assert answer.usage.completion_tokens == 3
            counts.append(num_streams())
        assert (await client.status()).pipelines[0].epoch > NUM_LOSSES
    for server in (router, first, last):
        await server.close()
    assert counts[-1] == counts[0], counts

"""Processes that are stopped and continued (SIGSTOP, SIGCONT): a pause for callers, an honest word for probes."""

import asyncio
import os
import signal
import time
from contextlib import ExitStack

import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stagecoach_client import AsyncClient
from tests.cluster import free_port
from tests.e2e.processes import running, shard_arguments

TIMEOUT_S = 60.0
FAULT_TIMEOUT_S = 2.0
PROBE_INTERVAL_S = 0.5
# Of a busy machine, beyond what is promised.
SLACK_S = 3.0
NUM_STREAMS = 8
OUTPUT_TOKENS = 200


def requests():
    """Half of them greedy, half of them seeded and with penalties."""
    for number in range(NUM_STREAMS):
        sampling = {"temperature": 0.0} if number % 2 else {"seed": 100 + number, "repetition_penalty": 1.2}
        yield {"prompt": f"Stream {number}: ", "max_tokens": OUTPUT_TOKENS, "ignore_eos": True} | sampling


async def health_becomes(stub, status):
    async with asyncio.timeout(TIMEOUT_S):
        while (await stub.Check(HealthCheckRequest())).status != status:
            await asyncio.sleep(0.02)


async def test_a_stopped_stage_costs_a_pause_and_shows_in_the_health(tiny_model):
    ports = [free_port() for _ in range(3)]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        shards = [
            stack.enter_context(running("stagecoach-shard", *shard_arguments(tiny_model, layers, port)))
            for layers, port in zip(("0:2", "2:4"), ports, strict=False)
        ]
        flags = ["--fault-timeout-s", str(FAULT_TIMEOUT_S), "--probe-interval-s", str(PROBE_INTERVAL_S)]
        router = stack.enter_context(
            running("stagecoach-router", "--shards", ",".join(addresses[:2]), "--listen", addresses[2], *flags)
        )
        await asyncio.to_thread(router.wait_for, "ready")
        async with (
            AsyncClient(addresses[2], max_retries=0) as client,
            grpc.aio.insecure_channel(addresses[2]) as channel,
        ):
            health = HealthStub(channel)
            await health_becomes(health, HealthCheckResponse.SERVING)
            undisturbed = [await client.generate(**request) for request in requests()]
            expected = [generation.completions[0].token_ids for generation in undisturbed]
            for shard in shards:
                await streams_survive(client, health, shard, expected)
            await idle_cluster_is_honest(health, shards[1])
            status = await client.status()
            assert status.num_free_blocks == status.num_blocks
        assert not [line for process in (router, *shards) for line in process.lines if "Traceback" in line]


async def streams_survive(client, health, shard, expected):
    streams = [await client.generate(stream=True, **request) for request in requests()]
    async with asyncio.timeout(TIMEOUT_S):
        for stream in streams:
            await anext(stream)
        os.kill(shard.pid, signal.SIGSTOP)
        await health_becomes(health, HealthCheckResponse.NOT_SERVING)
        os.kill(shard.pid, signal.SIGCONT)
        answers = await asyncio.gather(*(stream.collect() for stream in streams))
    assert [answer.completions[0].token_ids for answer in answers] == expected


async def idle_cluster_is_honest(health, shard):
    await health_becomes(health, HealthCheckResponse.SERVING)
    os.kill(shard.pid, signal.SIGSTOP)
    began = time.monotonic()
    await health_becomes(health, HealthCheckResponse.NOT_SERVING)
    assert time.monotonic() - began <= FAULT_TIMEOUT_S + PROBE_INTERVAL_S + SLACK_S
    alive = await health.Check(HealthCheckRequest(service="liveness"))
    assert alive.status == HealthCheckResponse.SERVING
    os.kill(shard.pid, signal.SIGCONT)
    await health_becomes(health, HealthCheckResponse.SERVING)

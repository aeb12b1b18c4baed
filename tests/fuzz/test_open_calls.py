"""Beside somebody who opens calls of every sort and does nothing with them, an honest caller is always served."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from tests.cluster import cluster, free_port, start_router
from tests.source_address import coming_from
from tests.tiny_model import random_prompts, reference_tokens

# For one call of the honest caller. On an idle machine it takes milliseconds, and beside the abuser up to a second.
PATIENCE_S = 20.0
SEED = 20_261


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@asynccontextmanager
async def abused(port: int, seed: int) -> AsyncIterator[None]:
    """While somebody abuses the server on a port, from a process of its own, so that its haste is not our slowness."""
    command = (sys.executable, "-m", "tests.fuzz.open_calls", str(port), str(seed))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"abusing\n"
        yield
        assert process.returncode is None, "it has not given up"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def is_alive(channel: grpc.aio.Channel) -> None:
    request = health_pb2.HealthCheckRequest(service="liveness")
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.nightly  # beside other work on the same cores, 20 s have not always been enough
async def test_an_honest_caller_is_served_beside_an_abuser_of_open_calls() -> None:
    """The abuser is another host, of a router that has no shards yet."""
    router = start_router([f"127.0.0.1:{free_port()}"], listen=f"127.0.0.1:{(port := free_port())}", max_stall_s=0.5)
    async with coming_from("127.0.0.2", port) as channel:
        await channel.channel_ready()
        async with abused(port, SEED):
            end_s = time.monotonic() + 4.0
            while time.monotonic() < end_s:
                await is_alive(channel)
                status = await InferenceStub(channel).GetClusterStatus(pb.GetClusterStatusRequest(), timeout=PATIENCE_S)
                assert not status.pipelines[0].ready
                await InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=PATIENCE_S)
        await is_alive(channel)
    await router.close()


@pytest.mark.nightly
@pytest.mark.timeout(600)
async def test_answers_are_exact_beside_an_abuser_of_open_calls(tiny_model, reference) -> None:
    [prompt] = random_prompts(1, 20)
    expected = reference_tokens(reference, prompt, 40)
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
    port = free_port()
    async with (
        cluster(tiny_model, listen=f"127.0.0.1:{port}", max_stall_s=2.0),
        coming_from("127.0.0.2", port) as channel,
    ):
        for seed in range(6):
            async with abused(port, seed):
                end_s = time.monotonic() + 30.0
                while time.monotonic() < end_s:
                    await is_alive(channel)
                    tokens: list[int] = []
                    async for response in InferenceStub(channel).Generate(request, timeout=PATIENCE_S):
                        tokens += response.token_ids
                    assert tuple(tokens) == expected

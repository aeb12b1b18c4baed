"""A stage that becomes ten times slower is found out, and a spare takes its place."""

import asyncio
import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from stagecoach_client import AsyncClient
from tests.cluster import free_port
from tests.e2e.processes import running

FAULT_TIMEOUT_S = 5.0
# Of a busy machine, beyond what is promised.
SLACK_S = 10.0
TIMEOUT_S = 90.0
# What a step costs is compared with what it cost some hundred steps before.
TOKENS_BEFORE = 600
TOKENS_AFTER = 50
# It runs for so long, and then stands still for nine times as long: a step takes several turns.
TURN_S = 0.002


@contextmanager
def ten_times_slower(pid):
    """From outside, by signals."""
    over = threading.Event()

    def slow_down():
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(9 * TURN_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(TURN_S)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.quiet
@pytest.mark.smollm2
@pytest.mark.timeout(240)
async def test_a_spare_takes_the_place_of_a_stage_that_has_become_slow(smollm2):
    ports = [free_port() for _ in range(4)]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        shards = []
        for layers, address in zip(("0:17", "17:30", "auto"), addresses, strict=False):
            flags = ["--model", str(smollm2), "--layers", layers, "--listen", address, "--kv-cache-memory", "256M"]
            shards.append(stack.enter_context(running("stagecoach-shard", *flags)))
        flags = ["--listen", addresses[3], "--fault-timeout-s", str(FAULT_TIMEOUT_S)]
        router = stack.enter_context(running("stagecoach-router", "--shards", ",".join(addresses[:3]), *flags))
        await asyncio.to_thread(router.wait_for, "ready")
        async with AsyncClient(addresses[3], max_retries=0) as client, asyncio.timeout(TIMEOUT_S):
            stream = await client.generate(
                "Once", stream=True, temperature=0, max_tokens=2 * TOKENS_BEFORE, ignore_eos=True
            )
            await tokens(stream, TOKENS_BEFORE)
            with ten_times_slower(shards[1].pid):
                began = time.monotonic()
                line = await asyncio.to_thread(router.wait_for, "has become many times slower")
                took_s = time.monotonic() - began
                assert addresses[1] in line
                assert took_s <= FAULT_TIMEOUT_S + SLACK_S
                await tokens(stream, TOKENS_AFTER)
                [pipeline] = (await client.status()).pipelines
                assert [stage.address for stage in pipeline.stages] == [addresses[0], addresses[2]]


async def tokens(stream, count):
    """Returns when so many more have come."""
    while count > 0:
        count -= len((await anext(stream)).token_ids)

"""One shard lies, in any way there is, and two are honest: the router serves, and tells nobody what it was told."""

from __future__ import annotations

import asyncio
import io
import logging
import random
from contextlib import asynccontextmanager

import pytest

from stagecoach import errors
from stagecoach.process.logs import LineFormatter, RepeatFilter
from stagecoach.v1 import shard_pb2
from stagecoach_client import AsyncClient
from stagecoach_router.pipelines import shard_files
from stagecoach_router.pipelines.shard_client import describe
from stagecoach_router.pipelines.shard_files import fetch_files
from tests.cluster import free_port, start_router, start_shard, wait_until_ready
from tests.fuzz.lying_shard import LIES, SESSIONS, Lie, LyingShard, random_lie
from tests.tiny_model import greedy, random_prompts, reference_tokens

TIMEOUT_S = 30.0
FAULT_TIMEOUT_S = 1.0
NUM_TOKENS = 4
# One of each kind in `make test`; the others run every night.
QUICK = (
    "2 billion blocks",
    "another model",
    "our own kind of error",
    "a broken tokenizer, as described",
    "refuses with our own kind of error",
    "a fault of six megabytes",
    "credits that nobody is owed",
)
SLOW = [name for name in LIES if name not in QUICK]


@asynccontextmanager
async def honest_shards(model):
    """Two of them, what the first one says it is, and its files."""
    shards = [start_shard(model, layers) for layers in ("0:2", "2:4")]
    try:
        yield shards, await _answer_of(shards[0].address), await fetch_files(shards[0].address)
    finally:
        for shard in shards:
            await shard.close()


async def _answer_of(address):
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return (await describe(address)).facts
            except errors.Unavailable:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def logged():
    """What a process would have written to its log."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    handler.addFilter(RepeatFilter())
    logging.getLogger().addHandler(handler)
    try:
        yield output
    finally:
        logging.getLogger().removeHandler(handler)


async def serves_beside(lie: Lie, shards, truth: shard_pb2.DescribeResponse, files, reference):
    liar = LyingShard(truth, files, lie, f"127.0.0.1:{free_port()}")
    await liar.start()
    addresses = [liar.address, *(shard.address for shard in shards)]
    async with logged() as log:
        router = start_router(addresses, fault_timeout_s=FAULT_TIMEOUT_S)
        try:
            async with AsyncClient(router.address, max_retries=0) as client:
                await wait_until_ready(client, router, *shards)
                prompt = random_prompts(1, 10)[0]
                async with asyncio.timeout(TIMEOUT_S):
                    answer = await client.generate(token_ids=prompt, **greedy(NUM_TOKENS))
                assert answer.completions[0].token_ids == reference_tokens(reference, prompt, NUM_TOKENS)
                status = await client.status()
            assert not router.task.done()
        finally:
            await router.close()
            await liar.stop()
    assert liar.asked
    if lie in SESSIONS.values():
        assert "Session" in liar.asked, "it was believed"
    for text in [spare.reason for spare in status.spares] + [pipeline.reason for pipeline in status.pipelines]:
        assert text.isprintable()
        assert len(text) < 2000
    text = log.getvalue()
    assert len(text) < 100_000
    assert all(line.isprintable() for line in text.splitlines())
    assert not any(line.startswith("12:00:00") for line in text.splitlines())


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(shard_files, "MAX_SILENCE_S", FAULT_TIMEOUT_S)
    monkeypatch.setattr("stagecoach_router.pipelines.stage_session.OPEN_TIMEOUT_S", FAULT_TIMEOUT_S)
    monkeypatch.setattr("stagecoach_router.pipelines.pipeline.OPEN_TIMEOUT_S", FAULT_TIMEOUT_S)


async def test_two_honest_shards_serve_whatever_a_third_says(tiny_model, reference):
    async with honest_shards(tiny_model) as (shards, truth, files):
        for name in QUICK:
            logging.getLogger(__name__).info("the lie: %s", name)
            await serves_beside(LIES[name], shards, truth, files, reference)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SLOW)
async def test_two_honest_shards_serve_whatever_a_third_says_at_night(tiny_model, reference, name):
    async with honest_shards(tiny_model) as (shards, truth, files):
        await serves_beside(LIES[name], shards, truth, files, reference)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20))
async def test_two_honest_shards_serve_beside_several_lies_at_once(tiny_model, reference, seed):
    dice = random.Random(seed)
    async with honest_shards(tiny_model) as (shards, truth, files):
        await serves_beside(random_lie(dice), shards, truth, files, reference)

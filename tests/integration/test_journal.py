"""With a journal, what a router accepted outlives it: the next one goes on, and so do the callers' streams."""

import asyncio

import pytest

from stagecoach import errors
from stagecoach_client import AsyncClient
from tests.cluster import start_router, start_shard, wait_until_ready
from tests.held_stage import held_stages
from tests.integration.test_reattach import assert_same
from tests.tiny_model import greedy, random_prompts

TIMEOUT_S = 60.0

# Few tokens to draw from: a batch of another shape rounds otherwise, and each border between two tokens is where one
# random number in some hundred thousand then falls on the other side.
DRAWN = {"max_tokens": 120, "ignore_eos": True, "top_k": 3}
KINDS = {
    "greedy": greedy(120),
    "sampled": {"seed": 5, "repetition_penalty": 1.2, "presence_penalty": 0.5, **DRAWN},
    "several": {"seed": 6, "n": 3, "temperature": 1.5, **DRAWN},
    "with log-probabilities": {"seed": 7, "logprobs": 2, **DRAWN},
    "with a stop string": {"seed": 8, "stop": ["e", "never \x00 there"], "temperature": 2.0, **DRAWN},
}


@pytest.fixture
async def shards(tiny_model):
    shards = [start_shard(tiny_model, layers) for layers in ("0:2", "2:4")]
    yield [shard.address for shard in shards]
    for shard in shards:
        await shard.close()


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "journal.sqlite"


async def test_streams_go_on_through_a_restart_of_the_router(shards, journal, monkeypatch):
    prompts = random_prompts(len(KINDS), 20)
    router = start_router(shards, journal=journal)
    async with AsyncClient(router.address) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router)
        undisturbed = await asyncio.gather(
            *(
                client.generate(token_ids=prompt, **options)
                for prompt, options in zip(prompts, KINDS.values(), strict=True)
            )
        )
        with held_stages(monkeypatch) as goes_on:
            streams = [
                await client.generate(token_ids=prompt, stream=True, **options)
                for prompt, options in zip(prompts, KINDS.values(), strict=True)
            ]
            for stream in streams:
                await anext(stream)
            goes_on.clear()
            router.stop.set()
            goes_on.set()
            await router.task
            router = start_router(shards, listen=router.address, journal=journal)
            answers = await asyncio.gather(*(stream.collect() for stream in streams))
        for before, after in zip(undisturbed, answers, strict=True):
            assert_same(before, after)
        status = await client.status()
        assert status.completion_tokens < sum(answer.usage.completion_tokens for answer in answers)
        assert status.num_free_blocks == status.num_blocks
    await router.close()


async def test_a_submit_is_computed_once_through_a_restart(shards, journal):
    submit = {"prompt": "Once", "request_id": "mine", "max_tokens": 20, "ignore_eos": True}
    router = start_router(shards, journal=journal)
    async with AsyncClient(router.address) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router)
        before = await client.generate(**submit)
        await router.close()
        router = start_router(shards, listen=router.address, journal=journal)
        await wait_until_ready(client, router)
        after = await client.generate(**submit)
        assert after.completions == before.completions
        assert (await client.status()).completion_tokens == 0
        with pytest.raises(errors.FailedPrecondition, match="another request"):
            await client.generate(**(submit | {"prompt": "Twice"}))
    await router.close()


async def test_a_request_that_was_cancelled_is_not_gone_on_with(shards, journal):
    router = start_router(shards, journal=journal)
    async with AsyncClient(router.address) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router)
        async with await client.generate("Once", stream=True, **greedy(400)) as stream:
            await anext(stream)
        while (await client.status()).num_running:
            await asyncio.sleep(0.01)
        await router.close()
        router = start_router(shards, listen=router.address, journal=journal)
        await wait_until_ready(client, router)
        assert (await client.status()).num_running == 0
    await router.close()


async def test_nobody_comes_back_for_a_request_and_it_ends(shards, journal, monkeypatch):
    router = start_router(shards, journal=journal)
    async with AsyncClient(router.address, max_retries=0) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router)
        with held_stages(monkeypatch) as goes_on:
            stream = await client.generate("Once", stream=True, **greedy(400))
            await anext(stream)
            goes_on.clear()
            router.stop.set()
            with pytest.raises(errors.Unavailable):
                await stream.collect()
            goes_on.set()
            await router.task
            goes_on.clear()
            router = start_router(shards, listen=router.address, journal=journal, max_linger_s=0.05)
            goes_on.set()
            async with AsyncClient(router.address) as later:
                await wait_until_ready(later, router)
                while (await later.status()).num_running:
                    await asyncio.sleep(0.01)
                status = await later.status()
                assert status.num_free_blocks == status.num_blocks
    await router.close()


async def test_another_models_journal_is_refused(shards, journal, other_model):
    router = start_router(shards, journal=journal)
    async with AsyncClient(router.address) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router)
        await router.close()
        other = start_shard(other_model, "0:4")
        with pytest.raises(errors.ConfigError, match=r"journal: .* of model") as caught:
            await start_router([other.address], journal=journal).task
        assert caught.value.field == "journal"
        await other.close()


async def test_of_two_models_a_router_goes_on_with_that_of_its_journal(shards, journal, other_model):
    """Else it could only end, though all that its requests need is there."""
    router = start_router(shards, journal=journal)
    async with AsyncClient(router.address) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router)
        await router.close()
    others = [start_shard(other_model, "0:4") for _ in range(2)]
    router = start_router([*(other.address for other in others), *shards], journal=journal)
    async with AsyncClient(router.address) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router)
        [pipeline] = (await client.status()).pipelines
        assert [stage.address for stage in pipeline.stages] == shards
    for server in (router, *others):
        await server.close()


async def test_a_disk_that_fails_costs_the_journal_and_no_answer(shards, journal, monkeypatch, caplog):
    import sqlite3

    from stagecoach_router.durability.journal_store import JournalStore

    apply, num_calls = JournalStore.apply, 0

    def full_after_three(self, entries):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 3:
            raise sqlite3.OperationalError("database or disk is full")
        apply(self, entries)

    router = start_router(shards, journal=journal)
    async with AsyncClient(router.address) as client, asyncio.timeout(TIMEOUT_S):
        await wait_until_ready(client, router)
        expected = await client.generate("Once", **greedy(30))
        monkeypatch.setattr(JournalStore, "apply", full_after_three)
        assert (await client.generate("Once", **greedy(30))).completions == expected.completions
        assert (await client.generate("Once", **greedy(30))).completions == expected.completions
        assert [record.message for record in caplog.records if "disk is full" in record.message] != []
    await router.close()

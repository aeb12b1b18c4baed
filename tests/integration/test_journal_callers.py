"""A restart of the router gives no caller more than its key allows."""

from __future__ import annotations

import asyncio

import pytest

from stagecoach import errors
from stagecoach.security.api_keys import Grant, new_entry, new_key, write_entry
from stagecoach_client import AsyncClient
from tests.cluster import start_router, start_shard, wait_until_ready
from tests.held_stage import held_stages
from tests.tiny_model import greedy

TIMEOUT_S = 60.0


async def num_taken_over(client):
    """Whether they run or wait until a token has come through; None where the router is not there yet."""
    try:
        status = await client.status()
    except errors.Unavailable:
        return None
    return status.num_running + status.num_waiting


async def test_requests_that_were_taken_over_count_as_their_callers(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("STAGECOACH_API_KEY", raising=False)
    key, path = new_key(), tmp_path / "keys.toml"
    path.write_text(write_entry(new_entry(key, "ann", Grant(max_concurrent=1))))
    facts = {"journal": tmp_path / "journal.sqlite", "api_keys": path}
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address], **facts)
    async with (
        AsyncClient(router.address, api_key=key) as patient,
        AsyncClient(router.address, api_key=key, max_retries=0) as hasty,
        asyncio.timeout(TIMEOUT_S),
    ):
        await wait_until_ready(patient, router, shard)
        with held_stages(monkeypatch) as goes_on:
            stream = await patient.generate("Once", stream=True, **greedy(100))
            await anext(stream)
            goes_on.clear()
            router.stop.set()
            goes_on.set()
            await router.task
            goes_on.clear()
            router = start_router([shard.address], listen=router.address, **facts)
            collecting = asyncio.create_task(stream.collect())
            while not await num_taken_over(hasty):
                await asyncio.sleep(0.01)
            with pytest.raises(errors.RateLimited):
                await hasty.generate("Twice", **greedy(2))
            goes_on.set()
            await collecting
        assert (await hasty.generate("Twice", **greedy(2))).completions
    await router.close()
    await shard.close()

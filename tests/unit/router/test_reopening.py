"""When a pipeline that is lost is opened again. Attempts are made no faster than so, and not later than they may be."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from stagecoach_router.engine import replica as replica_module
from tests.unit.router.fake_pipelines import FakeCluster, FakePipeline

TIMEOUT_S = 10.0
FOR_EVER_S = 1000.0


@pytest.fixture
async def pipeline(monkeypatch):
    monkeypatch.setattr(replica_module, "REOPEN_FIRST_DELAY_S", FOR_EVER_S)
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    await cluster.open(answered=True)
    never = asyncio.Event()
    shards = SimpleNamespace(is_ready_for=lambda _: False, stand_by=lambda: None, changed=never.wait)
    running = asyncio.create_task(cluster.engine.run(shards))
    await asyncio.sleep(0)
    yield pipeline
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def reopened(pipeline, epoch):
    async with asyncio.timeout(TIMEOUT_S):
        while pipeline.epoch < epoch:
            await asyncio.sleep(0)


async def test_a_pipeline_that_has_lived_is_opened_again_at_once(pipeline):
    pipeline.break_down()
    for _ in range(50):  # turns of the loop, which no timer gets into
        await asyncio.sleep(0)
    assert pipeline.epoch == 2


async def test_one_that_breaks_as_soon_as_it_is_open_is_not_opened_at_once_again(pipeline):
    pipeline.break_down()
    await reopened(pipeline, 2)
    pipeline.break_down()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reopened(pipeline, 3), 0.1)

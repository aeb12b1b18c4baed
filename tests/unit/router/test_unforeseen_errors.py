"""An error that nobody foresaw costs the pipeline in which it happens, and neither the others nor the process."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from stagecoach.errors import ConfigError, KVCacheFull, ModelMismatch
from stagecoach_router.engine import engine as engine_module
from stagecoach_router.engine import replica as replica_module
from tests.unit.router.fake_pipelines import FakeCluster, FakePipeline, request

TIMEOUT_S = 10.0


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(replica_module, "REOPEN_FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(replica_module, "REOPEN_MAX_DELAY_S", 0.001)
    monkeypatch.setattr(engine_module, "GROW_FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(engine_module, "GROW_MAX_DELAY_S", 0.001)


async def becomes(holds):
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():  # there is no event to wait for
            await asyncio.sleep(0.001)


class Shards:
    """There are always more."""

    def is_ready_for(self, num_replicas):
        return num_replicas <= 2

    def stand_by(self):
        pass

    async def changed(self):
        await asyncio.Event().wait()


@asynccontextmanager
async def running(cluster, shards=None):
    task = asyncio.create_task(
        cluster.engine.run(shards or SimpleNamespace(is_ready_for=lambda _: False, stand_by=lambda: None, changed=wait))
    )
    try:
        yield task
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def wait():
    await asyncio.Event().wait()


def raising(error, *, times):
    """What raises so many times, and then does what `then` does."""
    left = [error] * times

    def wrap(then):
        def call(*args, **kwargs):
            if left:
                raise left.pop()
            return then(*args, **kwargs)

        return call

    return wrap


async def test_a_probe_that_fails_costs_its_pipeline_and_the_other_serves():
    pipelines = FakePipeline(), FakePipeline()
    cluster = FakeCluster(*pipelines)
    replicas = [await cluster.open(answered=True), await cluster.open(answered=True)]
    state = cluster.submit(request("a", max_tokens=3))
    home, other = (0, 1) if replicas[0].num_sequences else (1, 0)
    probe = replicas[home]._probe
    probe.interval_s = 0.0
    probe.is_due = raising(ZeroDivisionError("a bug"), times=1)(probe.is_due)
    async with running(cluster):
        await becomes(lambda: pipelines[home].epoch == 2)
        assert cluster.engine.ready
        assert replicas[home].num_sequences == 0, "its request has moved"
        pipelines[other].answer_all()
        assert state.ended
        pipelines[home].answer()
        assert replicas[home].ready


@pytest.mark.parametrize(
    "error", [MemoryError(), ConfigError("of a shard"), ModelMismatch("no"), AssertionError("bug")]
)
async def test_a_pipeline_that_cannot_be_opened_again_is_tried_again(error):
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    replica = await cluster.open(answered=True)
    state = cluster.submit(request("a", max_tokens=3))
    replica._fit = raising(error, times=3)(replica._fit)
    async with running(cluster):
        pipeline.break_down()
        await becomes(lambda: replica.is_open)
        assert pipeline.epoch == 5, "each that was open and could not be used was given up"
        pipeline.answer_all()
        assert state.ended


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ConfigError("of a shard"), KVCacheFull.of_blocks(needed=2, free=1), RecursionError(), ValueError()],
)
async def test_a_further_pipeline_that_cannot_be_opened_ends_nothing(error):
    first, further = FakePipeline(), FakePipeline()
    further.connect = raising(error, times=3)(further.connect)
    cluster = FakeCluster(first, further)
    await cluster.open(answered=True)
    make_replica = cluster.engine._make_replica

    def make_again(owner):
        cluster._not_open[:] = [further]
        return make_replica(owner)

    cluster.engine._make_replica = make_again
    async with running(cluster, Shards()):
        await becomes(lambda: len(cluster.engine.replicas) == 2)
        state = cluster.submit(request("a", max_tokens=3))
        first.answer_all()
        further.answer_all()
        assert state.ended


async def test_shards_that_cannot_be_judged_end_nothing():
    cluster = FakeCluster(FakePipeline())
    await cluster.open(answered=True)
    shards = Shards()
    asked = []

    def is_ready_for(num_replicas):
        asked.append(num_replicas)
        if len(asked) < 3:
            raise ValueError("nobody foresaw this")
        return False

    shards.is_ready_for = is_ready_for
    async with running(cluster, shards):
        await becomes(lambda: len(asked) == 3)


async def test_a_request_that_cannot_be_begun_leaves_nothing_behind():
    """One of its completions was begun already."""
    cluster = FakeCluster(FakePipeline())
    replica = await cluster.open(answered=True)
    add = replica.add

    def add_one(state, sequence, **others):
        if sequence.index:
            raise ZeroDivisionError("a bug")
        add(state, sequence, **others)

    replica.add = add_one
    with pytest.raises(ZeroDivisionError):
        cluster.submit(request("a", n=3))
    assert replica.num_sequences == 0
    assert not replica.scheduler.has_work()

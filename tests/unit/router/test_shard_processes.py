"""What counts against a process ends with it: the next one at its address begins anew. No network."""

from __future__ import annotations

import asyncio

import pytest

from stagecoach.errors import FailedPrecondition, StagecoachError, Unavailable
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.pipelines import shard as shard_module
from stagecoach_router.pipelines import shard_registry
from stagecoach_router.pipelines.shard import Shard
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.pipelines.shard_registry import ShardRegistry

ADDRESS = "a:1"
LAYERS = LayerRange(2, 4)


def description(process_id: str, layers: LayerRange | None = None) -> ShardDescription:
    """Of a shard without layers of its own."""
    held = model_pb2.LayerRange() if layers is None else model_pb2.LayerRange(start=layers.start, end=layers.end)
    facts = shard_pb2.DescribeResponse(
        process_id=process_id,
        shard_id=f"{process_id} {layers}",
        layers=held,
        assignable=True,
        model=model_pb2.ModelDescription(fingerprint="f", num_layers=4),
    )
    return ShardDescription(ADDRESS, facts)


class FakeShards:
    """What is at the address, in the place of the calls to it: the answers that a test gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: ShardDescription | StagecoachError = description("one")
        self.assigned: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
        monkeypatch.setattr(shard_registry, "describe", self._describe)
        monkeypatch.setattr(shard_registry, "assign", self._assign)

    async def _describe(self, address: str, *_: object, **__: object) -> ShardDescription:
        if isinstance(self.answer, StagecoachError):
            raise self.answer
        return self.answer

    async def _assign(self, *_: object, **__: object) -> None:
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.assigned.put_nowait(answered)
        await answered


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> FakeShards:
    return FakeShards(monkeypatch)


async def becomes(registry: ShardRegistry, holds: object) -> Shard:
    """The shard, once `holds(shard)`."""
    shard = registry.shards[ADDRESS]
    async with asyncio.timeout(10):
        while not holds(shard):  # type: ignore[operator]
            shard.wake.set()
            await asyncio.sleep(0)
    return shard


@pytest.fixture
async def registry(shards: FakeShards):
    registry = ShardRegistry([ADDRESS], lease_id=1, timeout_s=1.0)
    running = asyncio.create_task(registry.run())
    await becomes(registry, lambda shard: shard.description is not None)
    yield registry
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def may_load(shard: Shard) -> bool:
    return shard.candidate is not None and shard.candidate.assignable


async def test_who_was_killed_while_it_loaded_is_asked_again_as_soon_as_it_is_back(registry, shards):
    """Seen as half a minute without a spare, while a new process had answered after 1.5 s."""
    registry.load(ADDRESS, LAYERS)
    (await shards.assigned.get()).set_exception(Unavailable(f"{ADDRESS}: Connection reset by peer"))
    shards.answer = description("two")
    shard = await becomes(registry, lambda shard: shard.description is not None and shard.loading is None)
    assert may_load(shard)
    assert shard.reason == ""


async def test_a_load_that_broke_is_tried_again_soon_but_not_at_once_by_the_same_process(registry, shards, monkeypatch):
    registry.load(ADDRESS, LAYERS)
    (await shards.assigned.get()).set_exception(Unavailable(f"{ADDRESS}: Connection reset by peer"))
    shard = await becomes(registry, lambda shard: shard.description is not None and shard.loading is None)
    assert shard.candidate is not None
    assert not may_load(shard)
    assert shard.reason == "", "nothing is known to be wrong with it"
    assert shard_module.BROKEN_LOAD_RETRY_S < shard_module.LOAD_RETRY_S


async def test_what_a_process_cannot_load_is_its_own_affair_and_not_that_of_the_next_one(registry, shards):
    registry.load(ADDRESS, LAYERS)
    (await shards.assigned.get()).set_exception(FailedPrecondition(f"{ADDRESS}: no memory for layers {LAYERS}"))
    shard = await becomes(registry, lambda shard: shard.description is not None and shard.loading is None)
    assert not may_load(shard)
    assert "no memory" in shard.reason
    shards.answer = description("one", LayerRange(0, 1))  # as after another router's load: still the same process
    await becomes(registry, lambda shard: shard.layers == LayerRange(0, 1))
    assert not may_load(shard)
    shards.answer = description("two")
    await becomes(registry, lambda shard: shard.layers is None and shard.description is not None)
    assert may_load(shard)
    assert shard.reason == ""


async def test_a_load_whose_process_is_gone_without_a_word_is_over_when_another_answers(registry, shards):
    """As when a machine loses its power: the call breaks only after half a minute."""
    registry.load(ADDRESS, LAYERS)
    answered = await shards.assigned.get()
    shards.answer = description("two")
    shard = await becomes(registry, lambda shard: shard.loading is None)
    assert may_load(shard)
    assert shard.reason == ""
    async with asyncio.timeout(10):
        await asyncio.wait([answered])
    assert answered.cancelled()
    assert shard.description is not None, "what the new process said is kept"
    registry.load(ADDRESS, LAYERS)
    (await shards.assigned.get()).set_result(None)
    await becomes(registry, lambda shard: shard.loading is None)


def test_blame_stays_with_a_process_whatever_it_loads_and_ends_with_it():
    shard = Shard(ADDRESS)
    shard.learn(description("one", LAYERS))
    shard.process.quarantine()
    for layers in (LAYERS, None, LayerRange(0, 2)):
        shard.learn(description("one", layers))
        assert shard.is_quarantined
    shard.learn(None, Unavailable("no answer"))
    assert not shard.is_quarantined, "nobody is there"
    shard.learn(description("two", LAYERS))
    assert not shard.is_quarantined


def test_a_new_name_for_each_answer_does_not_clear_who_breaks_pipelines_all_the_time():
    shard = Shard(ADDRESS)
    for number in range(shard_module.MAX_LOSSES):
        shard.learn(description(f"name {number}", LAYERS))
        assert not shard.is_quarantined, "a process that dies now and then is as good as new"
        shard.quarantine()
    for name in ("another", "and another"):
        shard.learn(None, Unavailable("refused"))
        shard.learn(description(name, LAYERS))
        assert shard.is_quarantined


def test_losses_that_are_long_ago_count_for_nothing_with_a_new_process(monkeypatch):
    shard = Shard(ADDRESS)
    for number in range(shard_module.MAX_LOSSES):
        shard.learn(description(f"process {number}", LAYERS))
        shard.quarantine()
    shard.lost_at_s[0] -= shard_module.QUARANTINE_S
    shard.learn(description("another", LAYERS))
    assert not shard.is_quarantined


async def test_who_says_that_it_has_loaded_and_then_has_nothing_is_left_alone(registry, shards):
    registry.load(ADDRESS, LAYERS)
    (await shards.assigned.get()).set_result(None)
    shard = await becomes(registry, lambda shard: shard.description is not None and shard.loading is None)
    assert not may_load(shard)
    assert "said that it has loaded layers 2:4, and has none" in shard.reason


async def test_who_has_loaded_what_another_router_wanted_may_be_told_again_soon(registry, shards):
    registry.load(ADDRESS, LAYERS)
    answered = await shards.assigned.get()
    shards.answer = description("one", LayerRange(0, 2))
    answered.set_result(None)
    shard = await becomes(registry, lambda shard: shard.description is not None and shard.loading is None)
    assert not may_load(shard)
    assert shard.reason == "", "nothing is known to be wrong with it"


async def test_who_has_loaded_what_it_was_told_may_be_told_something_else_at_once(registry, shards):
    registry.load(ADDRESS, LAYERS)
    answered = await shards.assigned.get()
    shards.answer = description("one", LAYERS)
    answered.set_result(None)
    shard = await becomes(registry, lambda shard: shard.layers == LAYERS)
    assert may_load(shard)


async def test_a_new_name_for_each_answer_makes_no_loop_of_loads(registry, shards, monkeypatch):
    for number in range(shard_module.MAX_LOADS):
        assert may_load(registry.shards[ADDRESS])
        registry.load(ADDRESS, LAYERS)
        (await shards.assigned.get()).set_result(None)
        shards.answer = description(f"name {number}")
        name = shards.answer.process_id
        await becomes(registry, lambda shard, name=name: shard.process.process_id == name and shard.loading is None)
    assert not may_load(registry.shards[ADDRESS])
    monkeypatch.setattr(shard_module, "LOADS_WINDOW_S", 0.0)
    assert may_load(registry.shards[ADDRESS])


async def test_an_open_pipeline_wakes_those_who_look_for_what_is_to_be_done():
    registry = ShardRegistry([ADDRESS], lease_id=1, timeout_s=1.0)
    waiting = asyncio.create_task(registry.changed(30.0))
    await asyncio.sleep(0)
    registry.pipeline_opened(description("one", LAYERS))
    async with asyncio.timeout(5.0):
        await waiting


def test_one_that_says_for_ever_that_it_loads_is_not_counted_on(monkeypatch):
    shard = Shard(ADDRESS)
    shard.learn(description("one"))
    shard.begin_load(LAYERS)
    shard.learn(None, Unavailable("loading", field="layers"))
    assert shard.candidate is not None
    assert shard.candidate.is_loading
    monkeypatch.setattr(shard_module, "LOAD_PATIENCE_S", 0.0)
    assert shard.candidate is None

"""Which layers a process serves: one load at a time, nothing under a lease, and whoever waits may go away."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from stagecoach import errors
from stagecoach.topology import LayerRange
from stagecoach_shard.leases.assignment import Assignment

TIMEOUT_S = 20.0
FIRST, SECOND = LayerRange(0, 2), LayerRange(2, 4)


class Runner:
    """One that computes nothing; `ends` is whether its thread ends in time."""

    def __init__(self, layers: LayerRange) -> None:
        self.layers = layers
        self.ends = True
        self.alive = True
        self.stopped = False

    def stop(self, timeout_s: float) -> bool:
        self.stopped = True
        return self.ends


class Scene:
    """An assignment whose loads take as long as `goes_on` is not set, and fail with `failure`."""

    def __init__(self, *, assignable: bool = True) -> None:
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.failure: Exception | None = None
        self.loads: list[Runner] = []
        self.ready: list[bool] = []
        self.assignment = Assignment(self._load, self._serve, assignable=assignable, on_ready=self.ready.append)

    def _load(self, layers: LayerRange) -> Any:
        assert all(runner.stopped for runner in self.loads), "the stage before is still there"
        assert self.goes_on.wait(TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        self.loads.append(Runner(layers))
        return self.loads[-1]

    @staticmethod
    def _serve(runner: Any) -> Any:
        return SimpleNamespace(runner=runner, layers=runner.layers, num_leases=0)

    def assign(self, layers: LayerRange) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self.assignment.assign(layers))


@pytest.fixture
async def scene():
    async with asyncio.timeout(TIMEOUT_S):
        yield Scene()


async def test_without_layers_there_is_no_stage(scene: Scene) -> None:
    with pytest.raises(errors.FailedPrecondition, match="no layers yet"):
        scene.assignment.served()
    scene.assignment.check_not_loading()


async def test_it_serves_what_it_was_told_last(scene: Scene) -> None:
    for layers in (FIRST, SECOND, FIRST):
        assert await scene.assign(layers) is scene.assignment.served()
        assert scene.assignment.served().layers == layers
    assert [runner.layers for runner in scene.loads] == [FIRST, SECOND, FIRST]
    assert scene.ready == [False, True] * 3


async def test_the_layers_that_it_has_are_not_loaded_again(scene: Scene) -> None:
    stage = await scene.assign(FIRST)
    stage.num_leases = 1
    assert await scene.assign(FIRST) is stage
    assert len(scene.loads) == 1


async def test_while_it_loads_it_has_no_stage_and_says_which_layers_will_be_there(scene: Scene) -> None:
    await scene.assign(FIRST)
    scene.goes_on.clear()
    loading = scene.assign(SECOND)
    await asyncio.sleep(0)
    for refuse in (scene.assignment.served, scene.assignment.check_not_loading):
        with pytest.raises(errors.Unavailable, match="loading layers 2:4") as caught:
            refuse()
        assert caught.value.retry_after_s > 0
    assert not scene.ready[-1]
    scene.goes_on.set()
    assert (await loading).layers == SECOND


async def test_one_load_at_a_time_and_who_asks_for_the_same_waits_for_it(scene: Scene) -> None:
    scene.goes_on.clear()
    first, same = scene.assign(FIRST), scene.assign(FIRST)
    await asyncio.sleep(0)
    with pytest.raises(errors.Unavailable, match="loading layers 0:2"):
        await scene.assign(SECOND)
    scene.goes_on.set()
    assert await first is await same
    assert len(scene.loads) == 1


async def test_a_caller_that_goes_away_does_not_stop_the_load(scene: Scene) -> None:
    scene.goes_on.clear()
    caller = scene.assign(FIRST)
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    scene.goes_on.set()
    await scene.assignment.loaded()
    assert scene.assignment.served().layers == FIRST


async def test_a_stage_with_a_lease_on_it_stays(scene: Scene) -> None:
    stage = await scene.assign(FIRST)
    stage.num_leases = 2
    with pytest.raises(errors.FailedPrecondition, match="2 leases are open on layers 0:2") as caught:
        await scene.assign(SECOND)
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("layers", "0:2", "2:4")
    assert scene.assignment.served() is stage


async def test_a_range_of_ones_own_is_not_for_others_to_change() -> None:
    scene = Scene(assignable=False)
    await scene.assignment.begin(FIRST)
    for layers in (FIRST, SECOND):
        with pytest.raises(errors.FailedPrecondition, match="a range of its own"):
            await scene.assign(layers)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (MemoryError("no room"), errors.FailedPrecondition, "layers 2:4 cannot be loaded: MemoryError: no room"),
        (errors.CheckpointError("truncated", field="x"), errors.CheckpointError, "truncated"),
    ],
)
async def test_a_load_that_fails_leaves_no_layers_and_the_next_one_may_succeed(
    scene: Scene, failure: Exception, kind: type[errors.StagecoachError], message: str
) -> None:
    await scene.assign(FIRST)
    scene.failure = failure
    callers = [scene.assign(SECOND) for _ in range(2)]
    for caller in callers:
        with pytest.raises(kind, match=message):
            await caller
    assert scene.assignment.stage is None
    assert scene.ready[-1], "it is as able as any shard without layers"
    scene.failure = None
    assert (await scene.assign(FIRST)).layers == FIRST


async def test_with_a_range_of_its_own_a_load_that_fails_makes_nothing_ready() -> None:
    scene = Scene(assignable=False)
    scene.failure = errors.ConfigError("kv-cache-memory: too much")
    with pytest.raises(errors.ConfigError, match="kv-cache-memory"):
        await scene.assignment.begin(FIRST)
    assert True not in scene.ready


async def test_beside_a_step_that_never_ends_nothing_is_loaded_and_the_process_has_to_end(scene: Scene) -> None:
    await scene.assign(FIRST)
    ended = asyncio.create_task(scene.assignment.computing_ended())
    scene.loads[0].ends = False
    with pytest.raises(errors.ShardFault, match="a step of other layers has not ended"):
        await scene.assign(SECOND)
    await ended
    assert scene.assignment.is_stuck
    assert not scene.ready[-1]
    with pytest.raises(errors.Unavailable, match="stopping"):
        await scene.assign(SECOND)
    with pytest.raises(errors.Unavailable, match="stopping"):
        scene.assignment.check_available()
    assert len(scene.loads) == 1
    assert not await scene.assignment.stop_computing()


async def test_who_is_about_to_stop_takes_no_layers(scene: Scene) -> None:
    assert scene.assignment.drain() == 0
    await scene.assignment.leases_ended()
    with pytest.raises(errors.Unavailable, match="stopping"):
        await scene.assign(FIRST)
    with pytest.raises(errors.Unavailable, match="stopping") as caught:
        scene.assignment.check_available()
    assert caught.value.retry_after_s > 0
    assert not scene.loads

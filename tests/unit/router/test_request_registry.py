"""Several calls read one request: what one of them wants, or how it ends, takes nothing from another."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import Any

import pytest

from stagecoach.errors import DeadlineExceeded, OutOfRange, Overloaded
from stagecoach.security.api_keys import Grant
from stagecoach_router.durability.request_registry import RequestRegistry
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.scheduling import waiting_queue
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.tenants.tenants import Tenant
from tests.unit.router.fake_pipelines import FakeCluster, FakePipeline, request

KEY = ("", "r")
# Far away, and never waited for.
LONG_S = 60.0


class Scene:
    """One request that a pipeline computes, and the calls that read it."""

    def __init__(self) -> None:
        self.pipeline = FakePipeline()
        self.cluster = FakeCluster(self.pipeline)
        self.registry = RequestRegistry(self.cluster.engine, max_linger_s=LONG_S)

    async def accept(self) -> RequestState:
        await self.cluster.open(answered=True)
        return self.registry.accept(KEY, b"digest", request("r"))

    def call(self, state: RequestState, *, linger_s: float = 0.0, remaining_s: float | None = LONG_S) -> ExitStack:
        """A call; to close it is to have it break."""
        call = ExitStack()
        call.enter_context(self.registry.reading(state, from_tokens=(), linger_s=linger_s, remaining_s=remaining_s))
        return call

    @property
    def next_deadline_s(self) -> float | None:
        return self.cluster.engine.replicas[0].scheduler.next_deadline_s


async def test_a_call_with_a_short_deadline_leaves_another_calls_request_alone() -> None:
    scene = Scene()
    state = await scene.accept()
    with scene.call(state, remaining_s=LONG_S):
        with scene.call(state, remaining_s=0.001):
            assert scene.next_deadline_s == pytest.approx(time.monotonic() + LONG_S, abs=5.0)
        assert scene.next_deadline_s == pytest.approx(time.monotonic() + LONG_S, abs=5.0)
        scene.pipeline.answer_all()
    assert state.ended
    assert state.error is None


async def test_a_call_without_a_deadline_keeps_what_a_call_with_one_began() -> None:
    scene = Scene()
    state = await scene.accept()
    with scene.call(state, remaining_s=0.001), scene.call(state, remaining_s=None):
        assert scene.next_deadline_s is None


async def test_when_the_last_deadline_has_passed_the_request_ends_although_it_would_linger() -> None:
    scene = Scene()
    state = await scene.accept()
    with scene.call(state, linger_s=LONG_S, remaining_s=0.01), scene.call(state, linger_s=LONG_S, remaining_s=0.02):
        reader: Any = state
        async with asyncio.timeout(10):
            while not state.ended:
                await reader.wait()
    assert isinstance(state.error, DeadlineExceeded)
    assert not scene.registry.knows(KEY)


async def test_a_request_lingers_for_the_call_that_asked_for_it_whoever_leaves_last() -> None:
    scene = Scene()
    state = await scene.accept()
    lingering, other = scene.call(state, linger_s=30.0), scene.call(state)
    lingering.close()
    other.close()
    assert not state.ended
    assert scene.next_deadline_s == pytest.approx(time.monotonic() + 30.0, abs=5.0)


async def test_a_request_whose_last_call_does_not_linger_ends_in_the_same_turn() -> None:
    scene = Scene()
    state = await scene.accept()
    first, second = scene.call(state), scene.call(state)
    first.close()
    assert not state.ended
    second.close()
    assert state.ended
    assert scene.registry.num_running == 0


async def test_nobody_comes_back_within_the_linger_time_and_the_request_ends() -> None:
    scene = Scene()
    state = await scene.accept()
    scene.call(state, linger_s=0.02).close()
    assert not state.ended
    async with asyncio.timeout(10):
        await scene.registry.all_ended()
    assert scene.cluster.engine.num_running == 0


def caller(name: str, grant: Grant | None = None) -> Caller:
    return Caller(name, Tenant(name, grant or Grant(), 0.0))


async def test_each_caller_has_a_share_of_the_places_to_run_and_to_wait() -> None:
    """Before, whoever came first could fill every place, with one request of 64 completions or with many."""
    scene = Scene()
    await scene.cluster.open(answered=True)
    registry = scene.registry
    assert scene.cluster.engine.num_places == 13
    greedy, late = caller("greedy"), caller("late")
    registry.accept(("", "many"), b"", request("many", n=8), caller=greedy)
    registry.accept(("", "more"), b"", request("more", n=4), caller=greedy)
    for check in (
        lambda: registry.check_room(greedy, 1),
        lambda: registry.accept(("", "x"), b"", request("x"), caller=greedy),
    ):
        with pytest.raises(Overloaded) as caught:
            check()
        assert (caught.value.limit, caught.value.value) == ("12", "13")
        assert caught.value.retry_after_s > 0
    registry.check_room(late, 1)
    registry.accept(("", "late"), b"", request("late"), caller=late)
    registry.cancel(("", "more"))
    registry.check_room(greedy, 1)


async def test_each_caller_has_a_share_of_the_tokens_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_queue, "MAX_WAITING_TOKENS", 45)
    scene = Scene()
    await scene.cluster.open(answered=True)
    registry, greedy, late = scene.registry, caller("greedy"), caller("late")
    registry.accept(("", "running"), b"", request("running", n=4), caller=greedy)
    registry.accept(("", "many"), b"", request("many", num_prompt=38, n=4), caller=greedy)
    with pytest.raises(Overloaded, match="by this caller"):
        registry.accept(("", "more"), b"", request("more", num_prompt=6), caller=greedy)
    registry.accept(("", "late"), b"", request("late", num_prompt=6), caller=late)


async def test_more_completions_than_a_caller_can_have_are_refused_for_good() -> None:
    scene = Scene()
    await scene.cluster.open(answered=True)
    with pytest.raises(OutOfRange) as caught:
        scene.registry.check_room(caller("greedy"), 13)
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("n", "12", "13")


async def test_what_a_tenants_request_counts_for_ends_with_it_however_it_ends() -> None:
    scene = Scene()
    await scene.cluster.open(answered=True)
    ann = caller("ann", Grant(max_concurrent=4))
    scene.registry.accept(("ann", "a"), b"", request("a", n=3), caller=ann)
    scene.registry.accept(("ann", "b"), b"", request("b"), caller=ann)
    assert ann.tenant.num_running == 4
    scene.registry.cancel(("ann", "a"))
    assert ann.tenant.num_running == 1
    scene.registry.close()
    assert ann.tenant.num_running == 0

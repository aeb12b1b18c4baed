"""Several calls read one request: what one of them wants, or how it ends, takes nothing from another."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import Any

import pytest

from stagecoach.errors import DeadlineExceeded
from stagecoach_router.durability.request_registry import RequestRegistry
from stagecoach_router.requests.request_state import RequestState
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

"""Whatever breaks and comes back, in whatever order, every request gets exactly its own tokens. No network."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stagecoach.errors import Overloaded, Unavailable
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import RequestState
from tests.unit.router.fake_pipelines import FakeCluster, request
from tests.unit.router.memory_pipeline import MemoryPipeline, expected_tokens

NUM_PIPELINES = 3


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.pipelines = [MemoryPipeline() for _ in range(NUM_PIPELINES)]
        self.cluster = FakeCluster(*self.pipelines, max_running=3, max_waiting=6)
        self.engine = self.cluster.engine
        self.live: list[tuple[Request, RequestState]] = []
        self.num_requests = 0
        self.wait_for(self.cluster.open())

    def teardown(self) -> None:
        try:
            self.everything_ends()
        finally:
            self.loop.close()

    def wait_for(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @precondition(lambda self: len(self.engine.replicas) < NUM_PIPELINES)
    @rule()
    def one_more_opens(self) -> None:
        self.wait_for(self.cluster.open())

    @rule(
        prefix=st.integers(0, 1),
        num_prompt=st.integers(1, 60),
        max_tokens=st.integers(1, 40),
        n=st.integers(1, 2),
        priority=st.integers(-1, 1),
    )
    def a_request_comes(self, prefix: int, num_prompt: int, max_tokens: int, n: int, priority: int) -> None:
        self.num_requests += 1
        asked = request(f"prefix {prefix}", num_prompt=num_prompt, max_tokens=max_tokens, n=n, priority=priority)
        try:
            self.live.append((asked, self.cluster.submit(asked)))
        except Overloaded:
            assert self.engine.num_waiting > 0

    @rule(which=st.integers(0, NUM_PIPELINES - 1), num_steps=st.integers(1, 12))
    def steps_come_back(self, which: int, num_steps: int) -> None:
        for _ in range(num_steps):
            self.pipelines[which].answer_one()

    @rule(which=st.integers(0, NUM_PIPELINES - 1))
    def one_breaks(self, which: int) -> None:
        if self.pipelines[which].is_open:
            self.pipelines[which].break_down()

    @rule(which=st.integers(0, NUM_PIPELINES - 1))
    def one_comes_back(self, which: int) -> None:
        if which < len(self.engine.replicas) and not self.pipelines[which].is_open:
            self.wait_for(self.engine.replicas[which].open())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def a_caller_goes_away(self, data: st.DataObject) -> None:
        _, state = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.engine.cancel(state)
        state.fail(Unavailable("gone"))

    @invariant()
    def each_request_has_one_home(self) -> None:
        for _, state in self.live:
            homes = [replica for replica in self.engine.replicas if state in replica.requests]
            assert len(homes) == (not state.ended)

    @invariant()
    def who_waits_for_no_reason_does_not(self) -> None:
        if self.engine.ready:
            for replica in self.engine.replicas:
                poison = [each for each in replica.requests if each.is_suspect]
                assert replica.is_open or replica.requests == poison

    def everything_ends(self) -> None:
        for replica, pipeline in zip(self.engine.replicas, self.pipelines, strict=False):
            if not pipeline.is_open:
                self.wait_for(replica.open())
        while any(pipeline.answer_one() for pipeline in self.pipelines):
            pass
        for asked, state in self.live:
            if state.error is not None:
                assert "lost 4 times" in str(state.error)
                continue
            assert state.ended
            for sequence in state.sequences:
                expected = expected_tokens(asked.prompt_tokens, asked.params.max_tokens or 0)
                assert sequence.output_tokens == expected
        for replica in self.engine.replicas:
            assert replica.num_sequences == 0
            assert replica.scheduler.blocks.num_free == replica.scheduler.blocks.num_blocks


TestCluster = Cluster.TestCase
TestCluster.settings = settings(stateful_step_count=40)

"""Whatever calls come to a request, read, break and come back: each gets its own tokens, and none harms another's.

Beside the registry runs a model of it: who reads, who may come back. No network, and no time passes: deadlines and
linger times are either over at once or never.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stagecoach.errors import StagecoachError
from stagecoach_router.durability.request_registry import RequestRegistry
from stagecoach_router.requests import output_stream
from stagecoach_router.requests.output_stream import OutputReader
from stagecoach_router.requests.request_state import RequestState
from tests.unit.router.fake_pipelines import FakeCluster, FakePipeline, request

KEY = ("", "r")
NEVER_S = 3600.0
MAX_TOKENS = 40
MAX_UNREAD = 3


@dataclass
class Call:
    reader: OutputReader
    stack: ExitStack
    linger_s: float
    from_tokens: list[int]
    got: list[list[int]] = field(default_factory=lambda: [[], []])
    is_over: bool = False


class Calls(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(output_stream, "MAX_UNREAD_DELTAS", MAX_UNREAD)
        self.pipeline = FakePipeline(num_blocks=16)
        self.cluster = FakeCluster(self.pipeline)
        self.registry = RequestRegistry(self.cluster.engine, max_linger_s=2 * NEVER_S)
        self.calls: list[Call] = []
        self.num_generations = 0
        self.is_awaited = False  # somebody may come back
        self.tokens: list[list[int]] = []  # of the request that there is, by completion
        self.next_token = 0
        self.state: RequestState | None = None
        self.wait_for(self.cluster.open(answered=True))

    def teardown(self) -> None:
        self.patch.undo()
        self.registry.close()
        self.loop.close()

    def wait_for(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @rule(
        n=st.integers(1, 2),
        from_tokens=st.lists(st.integers(0, MAX_TOKENS + 2), max_size=3),
        linger_s=st.sampled_from([0.0, NEVER_S]),
        remaining_s=st.sampled_from([None, NEVER_S, 2 * NEVER_S]),
    )
    def a_call_comes(self, n: int, from_tokens: list[int], linger_s: float, remaining_s: float | None) -> None:
        async def begin() -> None:
            state = self.registry.find(KEY, b"digest")
            if state is None:
                self.tokens = [[], []]
                state = self.registry.accept(KEY, b"digest", request("r", max_tokens=MAX_TOKENS, n=n))
            self.state = state
            stack = ExitStack()
            reading = self.registry.reading(state, from_tokens=from_tokens, linger_s=linger_s, remaining_s=remaining_s)
            reader = stack.enter_context(reading)
            if not self.open_calls:
                self.is_awaited = False
            self.calls.append(Call(reader, stack, linger_s, [*from_tokens, 0, 0][:2]))

        self.wait_for(begin())

    @property
    def open_calls(self) -> list[Call]:
        return [call for call in self.calls if not call.is_over]

    @precondition(lambda self: self.pipeline.sent)
    @rule(times=st.integers(1, 9))
    def steps_come_back(self, times: int) -> None:
        async def answer() -> None:
            state = self.state
            for _ in range(times):
                if self.pipeline.sent:
                    self.next_token = (self.next_token + 1) % 900
                    before = [] if state is None else [each.num_tokens for each in state.completions]
                    self.pipeline.answer(self.next_token)
                    for index, num_tokens in enumerate(before):
                        assert state is not None
                        if state.completions[index].num_tokens > num_tokens:
                            self.tokens[index].append(self.next_token)

        self.wait_for(answer())

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data())
    def a_call_reads(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.open_calls))

        async def read() -> None:
            state = call.reader._state
            reading = asyncio.create_task(call.reader.read())
            for _ in range(20):  # nothing here takes longer than so many turns of the loop
                await asyncio.sleep(0)
            if not reading.done():
                assert not state.ended
                reading.cancel()
                await asyncio.wait([reading])
                return
            try:
                deltas = reading.result()
            except StagecoachError:
                deltas = []
                assert state.error is not None or state.num_shown > MAX_UNREAD
                self.leave(call)
            for delta in deltas:
                call.got[delta.index].append(delta.token_id)
            if not deltas and not call.is_over:
                assert state.ended
                for index in range(state.request.params.n):
                    assert call.got[index] == self.tokens[index][call.from_tokens[index] :]
                self.leave(call)

        self.wait_for(read())

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data())
    def a_call_breaks(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.open_calls))

        async def leave() -> None:
            self.leave(call)

        self.wait_for(leave())

    def leave(self, call: Call) -> None:
        call.is_over = True
        self.is_awaited |= call.linger_s > 0
        call.stack.close()

    @invariant()
    def a_request_runs_for_as_long_as_somebody_wants_it(self) -> None:
        if self.state is None:
            return
        if self.state.ended:
            assert self.state.error is None or not (self.open_calls or self.is_awaited)
        else:
            assert self.open_calls or self.is_awaited

    @invariant()
    def every_call_has_the_tokens_that_it_asked_for_and_no_others(self) -> None:
        for call in self.open_calls:
            for index, got in enumerate(call.got):
                first = call.from_tokens[index]
                assert got == self.tokens[index][first : first + len(got)]


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

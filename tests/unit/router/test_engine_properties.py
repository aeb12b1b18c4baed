"""Whatever breaks and comes back, in whatever order, every request gets exactly its own tokens. No network.

The pipelines here have K/V memory that holds tokens: a row is written through its block table, and the token that
comes back is a hash of all that is read back through it. A wrong block, position or replay gives another token.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stagecoach.errors import Overloaded, Unavailable
from stagecoach.rpc.framing import read_frame
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.engine.engine import MAX_LOSSES_TO_MOVE
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import RequestState
from tests.unit.router.fake_pipelines import BLOCK_SIZE, VOCAB_SIZE, FakeCluster, FakePipeline, request

NUM_PIPELINES = 3
NUM_BLOCKS = 12
UNWRITTEN = -1


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % VOCAB_SIZE


class MemoryPipeline(FakePipeline):
    """Computes what its memory says. A new epoch finds the memory full of nonsense."""

    def __init__(self) -> None:
        super().__init__(NUM_BLOCKS)
        self.is_open = False

    async def connect(self, listener: Any) -> Any:
        opened = await super().connect(listener)
        self._memory = np.full(((NUM_BLOCKS + 1) * BLOCK_SIZE), UNWRITTEN)
        self._tables: dict[int, list[int]] = defaultdict(list)
        self._results: list[tuple[pb.StepResult, bytes]] = []
        self.is_open = True
        opened.send = self._compute
        return opened

    def _compute(self, frame: bytes, expected_s: float | None) -> None:
        message, payload = read_frame(pb.MicroBatch, frame)
        header, tokens = message.header, np.frombuffer(payload, "<i4")
        assert header.epoch == self.epoch
        for update in header.block_table_updates:
            table = self._tables[update.slot]
            del table[update.first :]
            table.extend(update.block_ids)
        ends, first = [], 0
        rows = list(zip(header.row_slots, header.row_starts, header.row_num_tokens, strict=True))
        for slot, start, num_tokens in rows:
            for offset in range(num_tokens):
                self._memory[self._place(slot, start + offset)] = tokens[first + offset]
                ends.append((slot, start + offset))
            first += num_tokens
        result, payload_out = pb.StepResult(epoch=header.epoch, step=header.step), b""
        for group in header.outputs:
            chosen = [next_token(self._read(*ends[index])) for index in group.token_indices]
            result.outputs.add(num_rows=len(chosen), num_columns=1, candidates=True, dtype=1)
            payload_out += np.array(chosen, "<i4").tobytes() + np.ones(len(chosen), "<f4").tobytes()
        self._results.append((result, payload_out))

    def _place(self, slot: int, position: int) -> int:
        return self._tables[slot][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def _read(self, slot: int, last: int) -> list[int]:
        return [int(self._memory[self._place(slot, position)]) for position in range(last + 1)]

    def answer_one(self) -> bool:
        """The oldest step comes back. False: nothing is under way."""
        if not self.is_open or not self._results:
            return False
        result, payload = self._results.pop(0)
        self.listener.result_came(result, memoryview(payload))
        return True

    def break_down(self) -> None:
        self.is_open = False
        super().break_down()


def expected_tokens(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


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
                poison = [each for each in replica.requests if each.num_losses > MAX_LOSSES_TO_MOVE]
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

"""Whatever a disk does, and whenever the router is killed: no request goes on from fewer tokens than were delivered.

The journal's own thread has a pace of its own, so what a seed comes to differs a little from run to run.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.durability import journal as journal_module
from stagecoach_router.durability.journal import Journal
from stagecoach_router.durability.journal_store import JournalStore
from stagecoach_router.requests.completion import FinishReason, OutputDelta
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled

TIMEOUT_S = 20.0


class Scene:
    """A journal, requests that get tokens, and a disk that fails before or after it has written."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "journal.sqlite"
        self.patch = pytest.MonkeyPatch()
        self.fails = ""
        self.has_failed = False  # since this router began
        self.requests: dict[str, RequestState] = {}
        self.num_requests = 0
        apply, begin_anew = JournalStore.apply, JournalStore.begin_anew

        def apply_or_fail(store: JournalStore, entries: Any) -> None:
            if self.fails == "before":
                raise sqlite3.OperationalError("database or disk is full")
            apply(store, entries)
            if self.fails == "after":
                raise sqlite3.OperationalError("disk I/O error")

        def begin_anew_or_fail(store: JournalStore, former: Any) -> None:
            if self.fails:
                raise sqlite3.OperationalError("database or disk is full")
            begin_anew(store, former)

        self.patch.setattr(JournalStore, "apply", apply_or_fail)
        self.patch.setattr(JournalStore, "begin_anew", begin_anew_or_fail)
        self.patch.setattr(journal_module, "RETRY_INTERVAL_S", 0.0005)
        self.wait_for(self.start())

    def close(self) -> None:
        self.fails = ""
        self.wait_for(self.journal.close())
        self.patch.undo()
        self.loop.close()
        self.folder.cleanup()

    def wait_for(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, TIMEOUT_S))

    async def start(self) -> None:
        self.journal = Journal(self.path)
        await self.journal.open()
        left = {entry.key[1]: entry for entry in await self.journal.load("f00d")}
        for name, entry in left.items():
            delivered = [delta.token_id for delta in self.requests[name].read_from(0)]
            in_file = [sampled.token_id for sampled in entry.past[0]]
            assert in_file[: len(delivered)] == delivered, "a delivered token would be drawn again"
        if not self.has_failed:
            assert left.keys() >= {name for name, state in self.requests.items() if state.num_shown}
        before, self.requests = self.requests, {}
        self.has_failed = False
        for name, entry in left.items():
            state = self.begin(name, len(entry.past[0]))
            for sampled in entry.past[0]:
                delta = OutputDelta(0, "x", sampled.token_id, sampled, None)
                if before[name].ended and sampled is entry.past[0][-1]:
                    delta.finish_reason = FinishReason.LENGTH
                tap, state.tap = state.tap, None  # they are in the file
                state.put(delta)
                state.tap = tap

    def begin(self, name: str, num_tokens: int = 0) -> RequestState:
        state = RequestState(Request(name, (1,), SamplingParams(max_tokens=99, seed=1)), key=("", name))
        completion: Any = SimpleNamespace(num_tokens=num_tokens)
        state.completions.append(completion)
        self.journal.begin(state)
        state.on_end = lambda error: self.journal.end(state.key) if error is None else self.journal.forget(state.key)
        self.requests[name] = state
        return state

    def a_request_comes(self, _: random.Random) -> None:
        async def come() -> None:
            self.num_requests += 1
            self.begin(f"r{self.num_requests}")

        self.wait_for(come())

    def a_token_comes(self, dice: random.Random) -> None:
        if not self.unfinished:
            return
        state, last = dice.choice(self.unfinished), dice.random() < 0.3

        async def come() -> None:
            self.has_failed |= bool(self.fails)
            reason = FinishReason.LENGTH if last else None
            state.put(OutputDelta(0, "x", 7, Sampled(7, None, ()), reason))

        self.wait_for(come())

    @property
    def unfinished(self) -> list[RequestState]:
        """Those whose last token has not come, whether or not it can be read already."""
        return [
            state
            for state in self.requests.values()
            if not any(delta.finish_reason for delta in state._log.read(0, len(state._log)))
        ]

    def the_loop_turns(self, dice: random.Random) -> None:
        async def turn(times: int) -> None:
            for _ in range(times):
                await self.journal._in_thread(lambda: None)

        self.wait_for(turn(dice.randrange(1, 9)))

    def the_disk_changes(self, dice: random.Random) -> None:
        how = dice.choice(["", "", "before", "after"])
        self.has_failed |= bool(how)
        self.fails = how

    def the_router_is_killed(self, _: random.Random) -> None:
        """What was committed is there; what is under way is not, or is: it has not been told either."""

        async def settle_file() -> None:
            if self.journal._writing is not None:
                self.journal._writing.cancel()
                await asyncio.wait([self.journal._writing])
            # Within the moment that it takes to delete a file that no longer holds, a kill finds it as it was.
            self.journal._closed.set()
            if self.journal._beginning_anew is not None:
                await asyncio.wait([self.journal._beginning_anew])
            await self.journal._in_thread(lambda: None)
            if self.journal._store is not None:
                self.journal._store.close()

        self.wait_for(settle_file())
        self.fails = ""
        self.wait_for(self.start())


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_routers_requests_go_on_from_all_that_was_delivered_or_not_at_all(seed: int) -> None:
    dice = random.Random(seed)
    scene = Scene()
    steps = [scene.a_request_comes, scene.a_token_comes, scene.the_loop_turns, scene.the_disk_changes]
    try:
        for _ in range(10):
            for _ in range(20):
                dice.choices(steps, [2, 6, 4, 1])[0](dice)
            scene.the_router_is_killed(dice)
    finally:
        scene.close()

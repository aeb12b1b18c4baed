"""The calls that are open, each with a place of its caller's until gRPC, too, is through with it."""

from __future__ import annotations

import asyncio
import weakref

from stagecoach_router.tenants.fair_share import FairShare


class OpenCalls:
    """A pool of `max_calls` places for calls of one sort. To be used on one event loop.

    A method that has returned does not end its call: while the peer takes nothing, its answer and its status wait in
    gRPC, which keeps the call, its task and their memory. So a place is free when the call's task is gone, which gRPC
    holds on to as long as to the call. Who takes no answers thereby uses up its own share, and nobody else's.
    """

    def __init__(self, what: str, max_calls: int) -> None:
        self._shares = FairShare(what, max_calls)

    def __len__(self) -> int:
        return self._shares.num_held

    def held_by(self, caller: str) -> int:
        """How many places a caller holds."""
        return self._shares.held_by(caller)

    def resize(self, max_calls: int) -> None:
        """So many places from now on. Calls that are open stay so."""
        self._shares.size = max_calls

    def enter(self, caller: str, retry_after_s: float) -> None:
        """Counts the call that runs in the current task. Raises Overloaded where its caller has too many."""
        self._shares.take(caller, retry_after_s=retry_after_s)
        task = asyncio.current_task()
        assert task is not None, "a call is a task"
        loop = task.get_loop()

        def leave() -> None:
            # Not at once: the garbage collector comes by in any thread, and in the midst of what is changed here.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._shares.give_back, caller)

        weakref.finalize(task, leave).atexit = False

"""Cuts off callers that take nothing of their answer: each keeps one of the calls that there may be."""

from __future__ import annotations

import asyncio
import math

_LOOKS_PER_STALL = 4


class StalledWrites:
    """Cancels tasks whose write has been under way for `max_stall_s`, at the latest a quarter of that later.

    One look at all of them now and then, because a timer for each message would cost as much as writing it.
    """

    def __init__(self, max_stall_s: float) -> None:
        self._max_stall_s = max_stall_s
        self._began_s: dict[asyncio.Task[object], float] = {}
        self._look: asyncio.TimerHandle | None = None

    def begin(self, task: asyncio.Task[object], now_s: float) -> None:
        """The task begins to write; `now_s` is the event loop's time."""
        self._began_s[task] = now_s
        if self._look is None and math.isfinite(self._max_stall_s):
            self._look = task.get_loop().call_later(self._max_stall_s / _LOOKS_PER_STALL, self._look_at_all)

    def end(self, task: asyncio.Task[object]) -> None:
        """The write is through, or has failed."""
        self._began_s.pop(task, None)

    def _look_at_all(self) -> None:
        self._look = None
        loop = asyncio.get_running_loop()
        for task, began_s in list(self._began_s.items()):
            if loop.time() - began_s >= self._max_stall_s:
                del self._began_s[task]
                task.cancel()
        if self._began_s:
            self._look = loop.call_later(self._max_stall_s / _LOOKS_PER_STALL, self._look_at_all)

"""Cuts off callers that take nothing of their answer: each keeps one of the calls that there may be."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import abort

_LOOKS_PER_STALL = 4

Context = grpc.aio.ServicerContext[Any, Any]


class WriteTimeouts:
    """Cancels calls whose write has been under way for `max_stall_s`, at the latest a quarter of that later.

    One look at all of them now and then, because a timer for each message would cost as much as writing it.
    """

    def __init__(self, max_stall_s: float) -> None:
        self._max_stall_s = max_stall_s
        self._began: dict[asyncio.Task[Any], tuple[float, Context]] = {}
        self._look: asyncio.TimerHandle | None = None
        self._farewells: set[asyncio.Task[None]] = set()

    def begin(self, task: asyncio.Task[Any], context: Context, now_s: float) -> None:
        """A call's task begins to write; `now_s` is the event loop's time."""
        self._began[task] = (now_s, context)
        if self._look is None and math.isfinite(self._max_stall_s):
            self._look = task.get_loop().call_later(self._max_stall_s / _LOOKS_PER_STALL, self._look_at_all)

    def end(self, task: asyncio.Task[Any]) -> None:
        """The write is through, or has failed."""
        self._began.pop(task, None)

    def _look_at_all(self) -> None:
        self._look = None
        loop = asyncio.get_running_loop()
        for task, (began_s, context) in list(self._began.items()):
            if loop.time() - began_s >= self._max_stall_s:
                del self._began[task]
                task.cancel()
                farewell = loop.create_task(self._say_why(context))
                self._farewells.add(farewell)
                farewell.add_done_callback(self._farewells.discard)
        if self._began:
            self._look = loop.call_later(self._max_stall_s / _LOOKS_PER_STALL, self._look_at_all)

    async def _say_why(self, context: Context) -> None:
        """The status lies behind what the caller has not read, and gets there when it does read, if ever.

        gRPC keeps both until then, or until the connection ends.
        """
        text = f"nothing of the answer was taken for {self._max_stall_s:g} s"
        with contextlib.suppress(grpc.aio.AbortError, grpc.aio.UsageError, grpc.aio.InternalError):
            await abort(context, errors.Overloaded(text, limit=self._max_stall_s))

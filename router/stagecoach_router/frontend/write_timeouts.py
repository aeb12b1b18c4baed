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
        self.max_stall_s = max_stall_s
        self._began: dict[Context, tuple[float, asyncio.Task[Any]]] = {}
        self._look: asyncio.TimerHandle | None = None
        self._farewells: set[asyncio.Task[None]] = set()

    def begin(self, context: Context) -> None:
        """The current task, which is the call's, begins to write."""
        task = asyncio.current_task()
        assert task is not None, "a call is a task"
        loop = task.get_loop()
        self._began[context] = (loop.time(), task)
        if self._look is None and math.isfinite(self.max_stall_s):
            self._look = loop.call_later(self.max_stall_s / _LOOKS_PER_STALL, self._look_at_all)

    def end(self, context: Context) -> None:
        """The write is through, or has failed."""
        self._began.pop(context, None)

    def _look_at_all(self) -> None:
        self._look = None
        loop = asyncio.get_running_loop()
        for context, (began_s, task) in list(self._began.items()):
            if loop.time() - began_s >= self.max_stall_s:
                del self._began[context]
                task.cancel()
                farewell = loop.create_task(self._say_why(context))
                self._farewells.add(farewell)
                farewell.add_done_callback(self._farewells.discard)
        if self._began:
            self._look = loop.call_later(self.max_stall_s / _LOOKS_PER_STALL, self._look_at_all)

    async def _say_why(self, context: Context) -> None:
        """The status lies behind what the caller has not read, and gets there when it does read, if ever.

        gRPC keeps both until then, or until the connection ends.
        """
        text = f"nothing of the answer was taken for {self.max_stall_s:g} s"
        with contextlib.suppress(grpc.aio.AbortError, grpc.aio.UsageError, grpc.aio.InternalError):
            await abort(context, errors.Overloaded(text, limit=self.max_stall_s))


class TimedContext:
    """A call's context whose writes have a limit of time; all else is as before."""

    def __init__(self, context: Context, timeouts: WriteTimeouts) -> None:
        self._context = context
        self._timeouts = timeouts
        self._has_begun = False

    async def write(self, message: Any) -> None:
        self._timeouts.begin(self._context)
        try:
            if not self._has_begun:
                # Apart from the message: while they are under way together, gRPC can send no status after them.
                await self._context.send_initial_metadata(())
                self._has_begun = True
            await self._context.write(message)
        finally:
            self._timeouts.end(self._context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

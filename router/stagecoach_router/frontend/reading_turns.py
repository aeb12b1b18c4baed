"""Whose request is received now, and how long it may take.

Until a message is complete, gRPC says nothing of it, but keeps what has come: up to 4 MiB of each. So there are only
so many turns. Most requests are there at once, and a sender that stops in the middle must not be in their way: after
half a second it needs one of the few turns for slow ones, and is cut off if its caller has its share of them already.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

import grpc.aio

from stagecoach import errors
from stagecoach_router.tenants.fair_share import FairShare

# For a request to be received before it counts as slow.
QUICK_S = 0.5
# For it to be received at all, which takes long only on a slow link: 4 MiB need 17 s at 2 Mbit/s.
READ_TIMEOUT_S = 60.0
# For its turn to come, or half of the time that there is to receive it, where that is less.
TURN_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


class ReadingTurns:
    """Receives at most `num_quick` requests at a time that have just begun to come, and `num_slow` others.

    Each caller has a share of either. Whose turn has not come waits: next is the caller with the fewest turns, and of
    its calls the one that has waited longest.
    """

    def __init__(
        self, num_quick: int, num_slow: int, *, read_timeout_s: float = READ_TIMEOUT_S, quick_s: float = QUICK_S
    ) -> None:
        self._quick_s = quick_s
        self._quick = _Turns(FairShare("turns to send a request", num_quick))
        self._slow = FairShare("turns to send a request slowly", num_slow)
        self._read_timeout_s = read_timeout_s

    async def read(self, context: Context, caller: str) -> Any:
        """The next request of a call, or grpc.aio.EOF.

        Raises Overloaded where its turn does not come, or it is too slow for the turns that there are, and
        DeadlineExceeded where it does not come in time.
        """
        await self._quick.enter(caller, min(TURN_TIMEOUT_S, self._read_timeout_s / 2))
        reading = _Reading(caller, self._quick, self._slow)
        try:
            async with asyncio.timeout(self._read_timeout_s) as limit:
                timer = asyncio.get_running_loop().call_later(self._quick_s, reading.slow_down, limit)
                try:
                    return await context.read()
                finally:
                    timer.cancel()
        except TimeoutError:
            text = f"the request was not received within {self._read_timeout_s:g} s"
            raise reading.refusal or errors.DeadlineExceeded(text, limit=self._read_timeout_s) from None
        finally:
            reading.end()


class _Reading:
    """A request that is being received: with a quick turn at first, then with a slow one, if there is one for it."""

    def __init__(self, caller: str, quick: _Turns, slow: FairShare) -> None:
        self._caller = caller
        self._quick = quick
        self._slow = slow
        self._is_slow = False
        self.refusal: errors.Overloaded | None = None

    def slow_down(self, limit: asyncio.Timeout) -> None:
        """It takes longer than most. Lets `limit` be over where there is no slow turn."""
        try:
            self._slow.take(self._caller, retry_after_s=RETRY_AFTER_S)
        except errors.Overloaded as error:
            self.refusal = error
            limit.reschedule(asyncio.get_running_loop().time())
            return
        self._is_slow = True
        self._quick.leave(self._caller)

    def end(self) -> None:
        if self._is_slow:
            self._slow.give_back(self._caller)
        else:
            self._quick.leave(self._caller)


class _Turns:
    """Shares for which callers wait."""

    def __init__(self, shares: FairShare) -> None:
        self._shares = shares
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def enter(self, caller: str, timeout_s: float) -> None:
        """Returns when it is the caller's turn. Raises Overloaded where it does not come in time."""
        if caller not in self._waiting and self._shares.room_for(caller):
            self._shares.take(caller)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line = self._waiting.setdefault(caller, deque())
        line.append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it came, but too late
                self.leave(caller)
            else:
                self._leave_line(caller, turn)
            if isinstance(error, TimeoutError):
                raise errors.Overloaded(
                    f"{self._shares.num_held} requests are being received, and no turn has come in {timeout_s:g} s",
                    limit=self._shares.size,
                    retry_after_s=RETRY_AFTER_S,
                ) from None
            raise

    def leave(self, caller: str) -> None:
        """Gives a turn back, and so perhaps to who waits for it."""
        self._shares.give_back(caller)
        while ready := [each for each in self._waiting if self._shares.room_for(each)]:
            next_caller = min(ready, key=self._shares.held_by)
            turn = self._waiting[next_caller][0]
            self._leave_line(next_caller, turn)
            if not turn.done():
                self._shares.take(next_caller)
                turn.set_result(None)

    def _leave_line(self, caller: str, turn: asyncio.Future[None]) -> None:
        line = self._waiting.get(caller)
        if line is None:
            return
        with contextlib.suppress(ValueError):
            line.remove(turn)
        if not line:
            del self._waiting[caller]

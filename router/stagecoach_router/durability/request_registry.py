"""Requests by the id that their callers gave them: a request that is sent twice is computed once.

A request is known from the moment it is accepted until it fails, is cancelled, or has been finished for a while. A call
with the id of a known one attaches to it, and reads from the token it asks for. A request runs for as long as a call
reads it, and for the `linger_s` of calls that broke (`requests/demand.py`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from stagecoach import errors
from stagecoach_router.durability.retention import Retention
from stagecoach_router.engine.engine import Engine
from stagecoach_router.requests.output_stream import OutputReader
from stagecoach_router.requests.request import Request, RequestKey
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.tenants.fair_share import FairShare


class Log(Protocol):
    """Where requests are written so that they outlive the process."""

    def begin(self, state: RequestState) -> None:
        """A request was accepted; from now on its deltas go through the log before anyone reads them."""

    def end(self, key: RequestKey) -> None:
        """A request has finished; it is kept for a while, for a caller who comes back for its output."""

    def forget(self, key: RequestKey) -> None:
        """A request has failed, or was kept for long enough: nothing of it is needed any more."""


class RequestRegistry:
    """The requests that one engine runs or has finished lately. `log`, where there is one, is told of all of them.

    Each caller has a share of the engine's places to run and to wait. Nobody who was accepted loses its place for that.
    """

    def __init__(self, engine: Engine, *, max_linger_s: float, log: Log | None = None) -> None:
        self._engine = engine
        self._max_linger_s = max_linger_s
        self._log = log
        self._known: dict[RequestKey, RequestState] = {}
        self._retained: Retention[RequestKey] = Retention()
        self._num_running = 0
        self._places = FairShare("places to run and to wait", 1)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Requests that have neither finished nor failed."""
        return self._num_running

    async def all_ended(self) -> None:
        """Returns when no request runs."""
        await self._idle.wait()

    def knows(self, key: RequestKey) -> bool:
        """Whether a request of this id is known."""
        self._forget(self._retained.forget_old(time.monotonic()))
        return key in self._known

    def find(self, key: RequestKey, digest: bytes) -> RequestState | None:
        """The request of this id, if it is known. Raises FailedPrecondition where that is another one."""
        self._forget(self._retained.forget_old(time.monotonic()))
        state = self._known.get(key)
        if state is not None and state.digest != digest:
            raise errors.FailedPrecondition(
                f"request_id: {key[1]!r} is the id of another request, with other content",
                field="request_id",
                value=key[1],
            )
        return state

    def check_room(self, caller: Caller, num_sequences: int) -> None:
        """Raises what `accept` would raise for want of room: before anything is spent on a request.

        Raises OutOfRange for more sequences than a caller could have at any time.
        """
        self._places.size = self._engine.num_places
        most = self._places.most_for_one
        if num_sequences > most:
            raise errors.OutOfRange(
                f"n: {num_sequences} completions; at most {most} sequences of one caller may run and wait",
                field="n",
                limit=most,
                value=num_sequences,
            )
        self._engine.check_room(num_sequences)
        self._places.check(caller.name, num_sequences, retry_after_s=self._engine.retry_after_s)

    def accept(
        self,
        key: RequestKey,
        digest: bytes,
        request: Request,
        past: Sequence[Sequence[Sampled]] = (),
        *,
        caller: Caller | None = None,
    ) -> RequestState:
        """Begins a request, or goes on with one that has had the tokens of `past`, by completion.

        Its sequences count as the caller's, and are charged to its tenant, until it ends. The prompt, and `past`, have
        been charged already. Raises what Engine.submit raises, and Overloaded where a new request would have more than
        its caller's share of the places; then nothing was begun.
        """
        assert key not in self._known, "found before"
        state = RequestState(request, key=key, digest=digest, caller=caller)
        num_sequences, name = request.params.n, state.caller_name
        if not past:
            self._places.size = self._engine.num_places
            self._places.check(name, num_sequences, retry_after_s=self._engine.retry_after_s)
        self._engine.submit(state, past)
        self._known[key] = state
        self._places.force(name, num_sequences)
        if state.tenant is not None:
            state.tenant.begin(num_sequences)
        self._num_running += 1
        self._idle.clear()
        if self._log is not None:
            self._log.begin(state)
        state.on_end = lambda error: self._end(state, error)
        if state.ended:  # with the tokens of `past`
            self._end(state, state.error)
        return state

    @contextmanager
    def reading(
        self, state: RequestState, *, from_tokens: Sequence[int], linger_s: float, remaining_s: float | None
    ) -> Iterator[OutputReader]:
        """For the time of a call: reads from so many tokens of each completion on.

        The call wants the request to go on for `linger_s` after it breaks, and has `remaining_s` to its deadline.
        """
        deadline_s = math.inf if remaining_s is None else time.monotonic() + remaining_s
        state.demand.begin_call(deadline_s)
        self._keep_while_wanted(state)
        try:
            yield OutputReader(state, from_tokens)
        finally:
            state.demand.end_call(deadline_s, time.monotonic() + min(linger_s, self._max_linger_s))
            self._keep_while_wanted(state)

    def linger(self, state: RequestState, linger_s: float) -> None:
        """Nobody reads a request yet: ends it, if nobody comes for so long."""
        state.demand.await_caller(time.monotonic() + linger_s)
        self._keep_while_wanted(state)

    def _keep_while_wanted(self, state: RequestState) -> None:
        """Has the request end when nobody wants it any more: at once, where that is so already."""
        if state.ended:
            return
        demand = state.demand
        if not demand.is_read and demand.until_s <= time.monotonic():
            self._cancel(state)
        else:
            self._engine.set_deadline(state, None if demand.until_s == math.inf else demand.until_s)

    def cancel(self, key: RequestKey) -> None:
        """Ends a request, whoever reads it; harmless for one that is not known or has ended."""
        state = self._known.get(key)
        if state is not None and not state.ended:
            self._cancel(state)

    def close(self) -> None:
        """The router stops: ends what has not ended, also what is finished and waits for the log."""
        for state in list(self._known.values()):
            state.fail(errors.Unavailable("the router is stopping"))

    def _cancel(self, state: RequestState) -> None:
        self._engine.cancel(state)
        state.fail(errors.Cancelled("the request was cancelled"))

    def _end(self, state: RequestState, error: errors.StagecoachError | None) -> None:
        self._places.give_back(state.caller_name, state.request.params.n)
        if state.tenant is not None:
            state.charge(time.monotonic())
            state.tenant.end(state.request.params.n)
        self._num_running -= 1
        if not self._num_running:
            self._idle.set()
        if error is not None:
            self._forget([state.key])
            return
        if self._log is not None:
            self._log.end(state.key)
        forgotten = self._retained.add(state.key, _cost_tokens(state), time.monotonic(), state.caller_name)
        self._forget(forgotten)

    def _forget(self, keys: Iterable[RequestKey]) -> None:
        for key in keys:
            state = self._known.pop(key, None)
            if state is not None and self._log is not None:
                self._log.forget(key)


def _cost_tokens(state: RequestState) -> int:
    """Tokens that are kept with a finished request; a log-probability counts as one."""
    params = state.request.params
    tokens_each = 1 if params.logprobs is None else 2 + params.logprobs
    return len(state.request.prompt_tokens) + state.num_output_tokens * tokens_each

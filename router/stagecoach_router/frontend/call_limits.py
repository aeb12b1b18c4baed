"""The calls that may be open at a time, and how their requests are read. In front of the router's services.

gRPC has a limit of calls, but whom it refuses it does not tell when to come back, and who comes first has them all. It
reads a request before anything of ours is asked, waits for it as long as the sender likes, and for an answer to be
taken as long as the caller likes. So here every call that is let in is counted, whatever it calls, as one of its
caller's. One that is refused is counted by nobody: gRPC keeps it until its status has left, or its connection ended.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach.rpc.addresses import host_of
from stagecoach_router.frontend.auth_interceptor import HEALTH_CHECK, Find, calling_tenant
from stagecoach_router.frontend.known_probers import MAX_CALLS, KnownProbers
from stagecoach_router.frontend.open_calls import OpenCalls
from stagecoach_router.frontend.reading_turns import READ_TIMEOUT_S, RETRY_AFTER_S, ReadingTurns
from stagecoach_router.frontend.request_shape import shape_checking
from stagecoach_router.frontend.write_timeouts import TimedContext, WriteTimeouts
from stagecoach_router.tenants.caller import caller_of

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context = grpc.aio.ServicerContext[Any, Any]
Serve = Callable[[Any, Any], Awaitable[Any]]

# What a tenant may call so often in a minute, and no more.
METERED = frozenset(f"/stagecoach.v1.Inference/{name}" for name in ("Generate", "Tokenize"))
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"

# Calls of other sorts than those that work on something, which have a limit each, so that none is in another's way.
MAX_HEALTH_CHECKS = 256
MAX_HEALTH_WATCHES = 256  # open for as long as somebody wants to know
MAX_REQUEST_STREAMS = 32  # each can make us hold a message between two requests: 4 MiB
# Requests that are received at a time: with 4 MiB each, what senders that stop in the middle can make us hold.
QUICK_TURNS, SLOW_TURNS = 64, 32
QUICK_CHECK_TURNS, SLOW_CHECK_TURNS = 16, 8
# A health check's request is a few bytes.
CHECK_READ_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class _Sort:
    """One sort of calls: how many may be open, and how many of their requests are received at a time."""

    calls: OpenCalls
    turns: ReadingTurns


class CallLimits(grpc.aio.ServerInterceptor):
    """Lets in at most `max_calls` more than `num_places()` at a time; each caller has a share. More are refused unread.

    Health checks are counted apart, or a busy router would be taken for a dead one, and those of hosts that are known
    (`known_probers.py`) apart from strangers'; so are health watches and calls with a stream of requests.
    `retry_after_s` says when to come back. A caller that takes nothing of its answer for `max_stall_s` is cut off, and
    so is one that leaves a stream of requests idle for so long.
    """

    def __init__(
        self,
        max_calls: int,
        retry_after_s: Callable[[], float] = lambda: RETRY_AFTER_S,
        *,
        num_places: Callable[[], int] = lambda: 0,
        max_stall_s: float = math.inf,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._max_calls = max_calls
        self._num_places = num_places
        self._retry_after_s = retry_after_s
        self._timeouts = WriteTimeouts(max_stall_s)
        turns = ReadingTurns(QUICK_TURNS, SLOW_TURNS, read_timeout_s=read_timeout_s)
        check_timeout_s = min(read_timeout_s, CHECK_READ_TIMEOUT_S)
        check_turns = ReadingTurns(QUICK_CHECK_TURNS, SLOW_CHECK_TURNS, read_timeout_s=check_timeout_s)
        own_turns = ReadingTurns(MAX_CALLS, SLOW_CHECK_TURNS, read_timeout_s=check_timeout_s)
        self._probers = KnownProbers()
        self._own_checks = _Sort(self._probers.calls, own_turns)
        self._usual = _Sort(OpenCalls("open calls", max_calls + num_places()), turns)
        self._checks = _Sort(OpenCalls("open health checks", MAX_HEALTH_CHECKS), check_turns)
        self._watches = _Sort(OpenCalls("open health watches", MAX_HEALTH_WATCHES), turns)
        self._streams = _Sort(OpenCalls("open streams of requests", MAX_REQUEST_STREAMS), turns)

    async def intercept_service(
        self, continuation: Find, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """The method's handler, or one that refuses."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        # A handler of streams is the one that reads its request itself; callers cannot tell the difference.
        return grpc.stream_stream_rpc_method_handler(
            self._guarded(handler, handler_call_details.method),
            request_deserializer=shape_checking(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, handler: Handler, method: str) -> Serve:
        if handler.request_streaming:
            return self._guarded_stream(handler.stream_stream)
        sort = self._watches if method == HEALTH_WATCH else self._usual
        handle: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        serve: Serve = handle if handler.response_streaming else _answer_once(handle)
        if method == HEALTH_CHECK:
            return self._guarded_check(serve)

        async def guarded(_: object, context: Context) -> None:
            caller = _caller(context)
            if method in METERED:
                await _check_reading(context)
            # Not kept in a variable: the service lets go of it when it has read it.
            await serve(await self._request(sort, caller, context), TimedContext(context, self._timeouts))

        return _forgetting_why_it_ended(guarded)

    def _guarded_check(self, serve: Serve) -> Serve:
        """Health checks need no key: each is nobody's call, and its host's share counts."""

        async def guarded(_: object, context: Context) -> None:
            host = host_of(context.peer())
            sort = self._own_checks if self._probers.has_place_for(host) else self._checks
            await serve(await self._request(sort, host, context), TimedContext(context, self._timeouts))
            self._probers.answered(host, time.monotonic())

        return _forgetting_why_it_ended(guarded)

    def _guarded_stream(self, handle: Any) -> Serve:
        async def guarded(_: object, context: Context) -> None:
            requests, timed = self._requests(_caller(context), context), TimedContext(context, self._timeouts)
            try:
                async with aclosing(requests), aclosing(handle(requests, timed)) as responses:
                    async for response in responses:
                        await timed.write(response)
            except errors.StagecoachError as error:
                await abort(context, error)

        return _forgetting_why_it_ended(guarded)

    async def _request(self, sort: _Sort, caller: str, context: Context) -> Any:
        """The request of a call that brings one. Ends the call where it is not let in, or brings none in time."""
        try:
            if sort is self._usual:
                sort.calls.resize(self._max_calls + self._num_places())
            sort.calls.enter(caller, self._retry_after_s())
            request = _taken(await sort.turns.read(context, caller))
            if request is grpc.aio.EOF:
                raise errors.InvalidArgument("the call brought no request")
        except errors.StagecoachError as error:
            await abort(context, error)
        return request

    async def _requests(self, caller: str, context: Context) -> AsyncGenerator[Any, None]:
        """The requests of a call that brings a stream of them. Raises what `_request` ends a call with."""
        sort, max_idle_s = self._streams, self._timeouts.max_stall_s
        sort.calls.enter(caller, self._retry_after_s())
        request = _taken(await sort.turns.read(context, caller))
        while request is not grpc.aio.EOF:
            yield request
            del request
            try:
                async with asyncio.timeout(max_idle_s if math.isfinite(max_idle_s) else None):
                    request = _taken(await context.read())
            except TimeoutError:
                text = f"no request has come for {max_idle_s:g} s"
                raise errors.DeadlineExceeded(text, limit=max_idle_s) from None


def _forgetting_why_it_ended(serve: Serve) -> Serve:
    """Lets go of what led to the end of a call.

    gRPC keeps the error that ended a call with the call, and so all that its traceback leads to, such as the call's
    task, on which the call's place depends: a circle that only the garbage collector would find.
    """

    async def forgetting(request: Any, context: Context) -> None:
        try:
            await serve(request, context)
        except grpc.aio.AbortError as error:
            error.__context__ = error.__cause__ = None
            raise error.with_traceback(None)  # noqa: B904  # what it came from is what is forgotten

    return forgetting


def _taken(request: Any) -> Any:
    """The request as it was read. Raises InvalidArgument where that was none, or held too much."""
    if isinstance(request, errors.InvalidArgument):
        raise request
    return request


def _caller(context: Context) -> str:
    return caller_of(calling_tenant(), context.peer())


async def _check_reading(context: Context) -> None:
    """Ends a call whose tenant goes on to send what it has used up its limits for: it is refused unread."""
    try:
        calling_tenant().check_reading(time.monotonic())
    except errors.RateLimited as error:
        await abort(context, error)


def _answer_once(serve: Serve) -> Serve:
    async def answer(request: Any, context: Context) -> None:
        await context.write(await serve(request, context))

    return answer

"""The calls that may be open at a time, and how their requests are read. In front of the router's services.

gRPC has a limit of calls, but whom it refuses it does not tell when to come back; and it reads a request before
anything of ours is asked, waits for it as long as the sender likes, and keeps its bytes as long as the call lasts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import grpc
import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach_router.frontend.auth_interceptor import HEALTH_CHECK, Find

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context = grpc.aio.ServicerContext[Any, Any]
Serve = Callable[[Any, Context], Awaitable[Any]]

# Requests that are received at a time: with 4 MiB each, what senders that stop in the middle can make us hold.
MAX_READING = 32
# Of these from one host, so that none of them can keep all others waiting.
MAX_READING_PER_HOST = MAX_READING // 4
# For a request to be received, which callers usually send at once; half of it for its turn to come.
READ_TIMEOUT_S = 10.0
RETRY_AFTER_S = 1.0


class CallLimits(grpc.aio.ServerInterceptor):
    """Lets in at most `max_calls` at a time that bring one request each; more are refused before theirs is received.

    The health check is always let in, or a busy router would be taken for a dead one. `retry_after_s` says when to come
    back. Calls with a stream of requests, which only reflection has, are left to gRPC's own limit.
    """

    def __init__(
        self,
        max_calls: int,
        retry_after_s: Callable[[], float] = lambda: RETRY_AFTER_S,
        *,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._max_calls = max_calls
        self._retry_after_s = retry_after_s
        self._read_timeout_s = read_timeout_s
        self._reading = asyncio.Semaphore(MAX_READING)
        # While anyone has one or waits for it.
        self._reading_from: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self.num_calls = 0

    async def intercept_service(
        self, continuation: Find, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """The method's handler, or one that refuses."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler_call_details.method == HEALTH_CHECK:
            return handler
        # A handler of streams is the one that reads its request itself; callers cannot tell the difference.
        return grpc.stream_stream_rpc_method_handler(
            self._guarded(handler),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, handler: Handler) -> Serve:
        handle: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        serve: Serve = handle if handler.response_streaming else _answer_once(handle)

        async def guarded(_: object, context: Context) -> None:
            if self.num_calls >= self._max_calls:
                await abort(context, self._full())
            self.num_calls += 1
            try:
                # Not kept in a variable: the service lets go of it when it has read it.
                await serve(await self._read(context), context)
            finally:
                self.num_calls -= 1

        return guarded

    def _full(self) -> errors.Overloaded:
        return errors.Overloaded(
            f"{self.num_calls} calls are open; at most {self._max_calls} may be",
            limit=self._max_calls,
            value=self.num_calls,
            retry_after_s=self._retry_after_s(),
        )

    async def _read(self, context: Context) -> Any:
        """The call's request. Ends the call where it does not come in time, or its turn to be received does not."""
        of_host = self._reading_from.setdefault(_host(context.peer()), asyncio.Semaphore(MAX_READING_PER_HOST))
        async with AsyncExitStack() as turn:
            try:
                async with asyncio.timeout(self._read_timeout_s / 2):
                    await turn.enter_async_context(of_host)  # who waits for these is not in the way of other hosts
                    await turn.enter_async_context(self._reading)
            except TimeoutError:
                await abort(context, self._no_turn())
            try:
                async with asyncio.timeout(self._read_timeout_s):
                    request = await context.read()
            except TimeoutError:
                text = f"the request was not received within {self._read_timeout_s:g} s"
                await abort(context, errors.DeadlineExceeded(text, limit=self._read_timeout_s))
        if request is grpc.aio.EOF:
            await abort(context, errors.InvalidArgument("the call brought no request"))
        return request

    def _no_turn(self) -> errors.Overloaded:
        limit, whose = (MAX_READING, "") if self._reading.locked() else (MAX_READING_PER_HOST, " from this host")
        text = f"{limit} requests{whose} are being received, and none of them was through in time"
        return errors.Overloaded(text, limit=limit, retry_after_s=self._retry_after_s())


def _host(peer: str) -> str:
    """Whose connection it is, as gRPC names it: "ipv4:1.2.3.4:5", "ipv6:[::1]:5". All that have no address are one."""
    kind, _, address = peer.partition(":")
    return address.rpartition(":")[0] if kind in ("ipv4", "ipv6") else ""


def _answer_once(serve: Serve) -> Serve:
    async def answer(request: Any, context: Context) -> None:
        await context.write(await serve(request, context))

    return answer

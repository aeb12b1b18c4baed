"""A generation while it runs: an iterator of chunks that goes on after a break, and ends its request when closed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from stagecoach.errors import (
    Cancelled,
    FailedPrecondition,
    StagecoachError,
    connection_ended,
    from_rpc_error,
)
from stagecoach.v1.inference_pb2 import GenerateResponse
from stagecoach_client.farewell import Farewell
from stagecoach_client.requests import GenerateCall
from stagecoach_client.results import Chunk, Generation, GenerationBuilder
from stagecoach_client.retry import Attempts

# Begins the call, given the seconds to its deadline, and returns gRPC's call object.
Begin = Callable[[float], Any]


class _Stream:
    """What the two streams share: what has come, how it ended, and what becomes of a call that failed.

    The subclasses read from `_call`, hand over each response (`_accept`), the end (`_finish`) and each failure
    (`_retry_delay_s`), and wait as long as they are told before they begin the call again (`_begin_again`).
    """

    def __init__(
        self, begin: Begin, call: GenerateCall, attempts: Attempts, peer: str, farewell: Farewell | None = None
    ) -> None:
        self._begin = begin
        self._farewell = farewell  # of a request that would linger
        self._ending: Any = None  # the call by which the server is told that it is not to
        self._peer = peer
        self._attempts = attempts
        self._builder = GenerationBuilder(call.num_completions)
        self._request = call.request
        # With an id the stream can go on after a break, and sending the request twice is harmless.
        self._request.request_id = self._request.request_id or uuid.uuid4().hex
        self._received = False  # a response has come
        self._begun = False  # the server has had the request, and may have begun with it
        self._broken: StagecoachError | None = None  # why the stream broke, until something new comes
        self._ended = False
        self._error: StagecoachError | None = None  # how the stream ended, unless it ended well
        self._call = begin(attempts.remaining_s())
        if farewell is not None:
            farewell.begin()

    @property
    def request_id(self) -> str:
        """The request's name on the server."""
        return self._builder.request_id or self._request.request_id

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # `begin` did not fail
            self._cancel()

    def _cancel(self) -> None:
        if not self._ended:
            self._ended = True
            self._error = Cancelled("the stream was closed before its end")
            if self._farewell is not None:
                self._ending = self._farewell.tell()
            self._call.cancel()

    def _accept(self, response: GenerateResponse) -> Chunk:
        self._received = self._begun = True
        # Only these are progress: the next call would bring the same again if the stream broke without them.
        if response.token_ids or response.finish_reason:
            self._broken = None
            self._attempts.has_progressed()
        try:
            return self._builder.add(response)
        except StagecoachError as error:
            self._cancel()
            self._error = error
            raise

    def _end(self) -> None:
        """The request is over, or as far as this stream goes."""
        self._ended = True
        if self._farewell is not None:
            self._farewell.done()

    def _finish(self) -> None:
        self._end()
        try:
            self._builder.build()
        except StagecoachError as error:
            self._error = error
            raise

    def _retry_delay_s(self, failure: grpc.RpcError) -> float:
        """How long to wait before the call is made again. Raises the typed error if it is not made again."""
        error = from_rpc_error(failure, self._peer)
        if self._error is not None:  # the stream was closed meanwhile: then it no longer matters why the call failed
            raise self._error from failure
        self._begun = self._begun or connection_ended(failure)
        if self._begun:
            # A server that does not know the request has no more to say. Why the stream broke tells the caller more.
            is_unknown = self._received and self._broken is not None and isinstance(error, FailedPrecondition)
            self._broken = self._broken or error
            error = self._broken if is_unknown else error
            delay_s = None if is_unknown else self._attempts.reattach_delay_s(error)
        else:
            delay_s = self._attempts.delay_s(error)
        if delay_s is None:
            self._end()
            self._error = error
            raise error from failure
        return delay_s

    def _begin_again(self) -> None:
        if self._error is not None:  # the stream was closed during the wait
            raise self._error
        if self._received:
            self._request.from_tokens[:] = self._builder.num_tokens
        self._call = self._begin(self._attempts.remaining_s())

    def _result(self) -> Generation:
        if self._error is not None:
            raise self._error
        return self._builder.build()


async def wait_for_event(event: asyncio.Event, timeout_s: float) -> None:
    """Returns as soon as the event is set, and after `timeout_s` in any case."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


class GenerationStream(_Stream, Iterator[Chunk]):
    """The chunks of a generation as they come. Errors of the server are raised where the chunks are read.

    To leave before the end, use it in a `with` statement or call `close`: that cancels the request on the server.
    """

    def __init__(
        self, begin: Begin, call: GenerateCall, attempts: Attempts, peer: str, farewell: Farewell | None = None
    ) -> None:
        self._closed = threading.Event()
        super().__init__(begin, call, attempts, peer, farewell)

    def __next__(self) -> Chunk:
        while not self._ended:
            try:
                response = next(self._call)
            except StopIteration:
                self._finish()
            except grpc.RpcError as failure:
                self._closed.wait(self._retry_delay_s(failure))
                self._begin_again()
            else:
                return self._accept(response)
        raise StopIteration

    def collect(self) -> Generation:
        """Reads to the end, and returns the whole answer, including the chunks that were read before."""
        for _ in self:
            pass
        return self._result()

    def close(self) -> None:
        """Ends the request if it has not ended. It may be called from any thread, and more than once."""
        self._cancel()
        self._closed.set()
        if self._ending is not None:
            with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
                self._ending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncGenerationStream(_Stream, AsyncIterator[Chunk]):
    """The chunks of a generation as they come. Errors of the server are raised where the chunks are read.

    To leave before the end, use it in an `async with` statement or call `aclose`: that cancels the request on the
    server. So does cancelling the task that waits for a chunk.
    """

    def __init__(
        self, begin: Begin, call: GenerateCall, attempts: Attempts, peer: str, farewell: Farewell | None = None
    ) -> None:
        self._closed = asyncio.Event()
        super().__init__(begin, call, attempts, peer, farewell)

    async def __anext__(self) -> Chunk:
        try:
            return await self._next()
        except asyncio.CancelledError:
            self._cancel()
            task = asyncio.current_task()
            if self._error is None or (task is not None and task.cancelling()):
                raise
            raise self._error from None  # nobody cancelled this task: the call was cancelled, by closing the stream

    async def _next(self) -> Chunk:
        while not self._ended:
            try:
                # call.read() would not do: it says "end" as soon as the status is there, even if messages are left.
                response = await anext(aiter(self._call))
            except StopAsyncIteration:
                self._finish()
            except grpc.RpcError as failure:
                await wait_for_event(self._closed, self._retry_delay_s(failure))
                self._begin_again()
            else:
                return self._accept(response)
        raise StopAsyncIteration

    async def collect(self) -> Generation:
        """Reads to the end, and returns the whole answer, including the chunks that were read before."""
        async for _ in self:
            pass
        return self._result()

    async def aclose(self) -> None:
        """Ends the request if it has not ended. It may be called more than once."""
        self._cancel()
        self._closed.set()
        if self._ending is not None:
            with contextlib.suppress(grpc.RpcError):
                await self._ending

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

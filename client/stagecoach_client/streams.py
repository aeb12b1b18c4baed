"""A generation while it runs: an iterator of chunks, which ends the call on the server when it is closed."""

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
    Unavailable,
    from_rpc_error,
    from_trailing_metadata,
)
from stagecoach.v1.inference_pb2 import GenerateResponse
from stagecoach_client.requests import GenerateCall
from stagecoach_client.results import Chunk, Generation, GenerationBuilder
from stagecoach_client.retry import Attempts, connection_ended

# Begins the call with so many seconds to its deadline, and returns gRPC's call object.
Begin = Callable[[float], Any]
# Asks the server to end a request at once, though it would linger; returns gRPC's call object.
End = Callable[[], Any]


class _Stream:
    """What the two streams share: what has come, how it ended, and whether a failure can be retried."""

    def __init__(self, begin: Begin, end: End, call: GenerateCall, attempts: Attempts, peer: str) -> None:
        self._begin = begin
        self._end = end
        self._ending: Any = None  # what `end` returned
        self._peer = peer
        self._attempts = attempts
        self._builder = GenerationBuilder(call.num_completions)
        self._request = call.request
        # So that the request can be gone on with, and sending it twice is harmless.
        self._request.request_id = self._request.request_id or uuid.uuid4().hex
        self._received = False
        self._begun = False  # the server had the request, and may have begun
        self._broken: StagecoachError | None = None  # why the call that brought the last chunk ended
        self._ended = False
        self._error: StagecoachError | None = None
        self._call = begin(attempts.remaining_s())

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
            if self._request.linger_s:
                # Where the channel or its event loop is closed, nobody can be told.
                with contextlib.suppress(ValueError, RuntimeError, grpc.aio.UsageError):
                    self._ending = self._end()
            self._call.cancel()

    def _accept(self, response: GenerateResponse) -> Chunk:
        self._received = self._begun = True
        if response.token_ids or response.finish_reason:  # without them the next call would bring the same again
            self._broken = None
            self._attempts.has_progressed()
        try:
            return self._builder.add(response)
        except StagecoachError as error:
            self._cancel()
            self._error = error
            raise

    def _finish(self) -> None:
        self._ended = True
        try:
            self._builder.build()
        except StagecoachError as error:
            self._error = error
            raise

    def _retry_delay_s(self, failure: grpc.RpcError) -> float:
        """How long to wait before the call is made again; raises the typed error when it is not to be."""
        error = from_rpc_error(failure, self._peer)
        if self._error is not None:  # it was closed meanwhile, which is why it failed, or might as well be
            raise self._error from failure
        self._begun = self._begun or _ended_with_its_connection(error, failure)
        if self._begun:
            # A server that knows nothing of the request says so; why the stream broke says more.
            is_unknown = self._received and self._broken is not None and isinstance(error, FailedPrecondition)
            self._broken = self._broken or error
            error = self._broken if is_unknown else error
            delay_s = None if is_unknown else self._attempts.reattach_delay_s(error)
        else:
            delay_s = self._attempts.delay_s(error)
        if delay_s is None:
            self._ended = True
            self._error = error
            raise error from failure
        return delay_s

    def _begin_again(self) -> None:
        if self._error is not None:  # it was closed in the meantime
            raise self._error
        if self._received:
            self._request.from_tokens[:] = self._builder.num_tokens
        self._call = self._begin(self._attempts.remaining_s())

    def _result(self) -> Generation:
        if self._error is not None:
            raise self._error
        return self._builder.build()


def _ended_with_its_connection(error: StagecoachError, failure: grpc.RpcError) -> bool:
    """Whether gRPC, and not the server, ended a call that had reached the server."""
    is_bare = from_trailing_metadata(getattr(failure, "trailing_metadata", lambda: ())()) is None
    return is_bare and type(error) is Unavailable and connection_ended(error.message)


async def wait_for_event(event: asyncio.Event, timeout_s: float) -> None:
    """Returns when the event is set, after `timeout_s` at the latest."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


class GenerationStream(_Stream, Iterator[Chunk]):
    """The chunks of a generation as they come. Errors of the server are raised where its chunks are awaited.

    Use it in a `with` statement, or call `close`, to leave before the end: that cancels the request on the server.
    """

    def __init__(self, begin: Begin, end: End, call: GenerateCall, attempts: Attempts, peer: str) -> None:
        self._closed = threading.Event()
        super().__init__(begin, end, call, attempts, peer)

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
        """Reads to the end; returns everything, the chunks that were read before included."""
        for _ in self:
            pass
        return self._result()

    def close(self) -> None:
        """Ends the request, if it has not ended. May be called from another thread, and more than once."""
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
    """The chunks of a generation as they come. Errors of the server are raised where its chunks are awaited.

    Use it in an `async with` statement, or call `aclose`, to leave before the end: that cancels the request on the
    server, and so does cancelling the task that waits for a chunk.
    """

    def __init__(self, begin: Begin, end: End, call: GenerateCall, attempts: Attempts, peer: str) -> None:
        self._closed = asyncio.Event()
        super().__init__(begin, end, call, attempts, peer)

    async def __anext__(self) -> Chunk:
        try:
            return await self._next()
        except asyncio.CancelledError:
            self._cancel()
            task = asyncio.current_task()
            if self._error is None or (task is not None and task.cancelling()):
                raise
            raise self._error from None  # not this task was cancelled, but the call: someone closed it

    async def _next(self) -> Chunk:
        while not self._ended:
            try:
                # Not call.read(): it says "end" as soon as the status is there, without looking for messages.
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
        """Reads to the end; returns everything, the chunks that were read before included."""
        async for _ in self:
            pass
        return self._result()

    async def aclose(self) -> None:
        """Ends the request, if it has not ended. May be called more than once."""
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

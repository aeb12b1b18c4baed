"""The client for asyncio, whose calls are awaited."""

from __future__ import annotations

import asyncio
import weakref
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from stagecoach.errors import Cancelled, from_rpc_error
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S
from stagecoach.v1.inference_pb2 import GetClusterStatusRequest, ListModelsRequest
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_client.farewell import farewell_to
from stagecoach_client.requests import GenerateOptions, Messages, generate_call, tokenize_request
from stagecoach_client.results import Generation, Tokenization, read_tokenization
from stagecoach_client.settings import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    Settings,
    choose_api_key,
    peer_name,
)
from stagecoach_client.status import ClusterStatus, Model, read_models, read_status
from stagecoach_client.streams import AsyncGenerationStream, wait_for_event
from stagecoach_client.tls import Tls


class AsyncClient:
    """Calls a router from one event loop. Its arguments, and what it promises, are those of Client.

    It may be made before the loop runs: it connects with its first call. Close it with `aclose`, or use it in an
    `async with` statement.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        api_key: str | None = None,
        tls: Tls | None = None,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        self._settings = Settings(
            target, timeout_s, connect_timeout_s, max_retries, tls=tls, api_key=choose_api_key(api_key)
        )
        self._given_channel = channel
        self._channel = channel
        self._own_channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._connecting = asyncio.Lock()
        self._peer = peer_name(target, channel)
        self._closed = asyncio.Event()
        self._streams: weakref.WeakSet[AsyncGenerationStream] = weakref.WeakSet()  # so that they can be closed with it

    @overload
    async def generate(
        self, prompt: str | None = None, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    async def generate(
        self, prompt: str | None = None, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream: ...
    @overload
    async def generate(
        self, prompt: str | None = None, *, stream: bool, **options: Unpack[GenerateOptions]
    ) -> Generation | AsyncGenerationStream: ...
    async def generate(
        self, prompt: str | None = None, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Generation | AsyncGenerationStream:
        """Takes and returns what Client.generate does; with `stream`, chunks are read with `async for`.

        A stream is returned as soon as its request is on its way: `async for chunk in await client.generate(...)`.
        Cancelling the task that waits for the answer cancels the request on the server.
        """
        call = generate_call(prompt, options)
        stub = await self._connected()
        chunks = AsyncGenerationStream(
            lambda timeout_s: stub.Generate(call.request, **self._settings.call_options(timeout_s)),
            call,
            self._settings.generate_attempts(call.timeout_s),
            self._peer,
            farewell_to(call.request, stub.Cancel, self._settings, self._given_channel),
        )
        self._streams.add(chunks)
        if stream:
            return chunks
        async with chunks:
            return await chunks.collect()

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> Tokenization:
        """The token ids of exactly one of `prompt` and `messages` (through the checkpoint's chat template)."""
        request = tokenize_request(prompt, messages, model)
        return read_tokenization(await self._read("Tokenize", request, timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """The models that the router serves."""
        return read_models(await self._read("ListModels", ListModelsRequest(), timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """How the router and its pipelines are, and what they have done since they started."""
        return read_status(await self._read("GetClusterStatus", GetClusterStatusRequest(), timeout_s))

    async def aclose(self) -> None:
        """Ends all calls, also those that wait for their next attempt, and the connection."""
        self._closed.set()
        for stream in list(self._streams):
            await stream.aclose()
        if self._own_channel is not None:
            await self._own_channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _connected(self) -> Any:
        """The stub, made with the first call: a channel of grpc.aio belongs to the loop that it is made in."""
        self._check_open()
        if self._stub is None:
            async with self._connecting:
                if self._channel is None:
                    channel = await self._settings.async_channel()
                    if self._closed.is_set():  # while files were read
                        await channel.close()
                    self._check_open()
                    self._own_channel = self._channel = channel
                self._stub = self._stub or InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        return self._stub

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("this client has been closed")

    async def _read(self, method: str, request: Any, timeout_s: float | None) -> Any:
        attempts = self._settings.read_attempts(timeout_s)
        stub = await self._connected()
        while True:
            try:
                return await getattr(stub, method)(request, **self._settings.call_options(attempts.remaining_s()))
            except grpc.RpcError as failure:
                error = from_rpc_error(failure, self._peer)
                delay_s = attempts.delay_s(error)
                if delay_s is None:
                    raise error from failure
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                # Nobody has cancelled the task, so it was the call that was cancelled, with its channel.
                raise Cancelled("the client was closed during the call") from None
            await wait_for_event(self._closed, delay_s)
            if self._closed.is_set():
                raise Cancelled("the client was closed during the call")

"""The client for asyncio."""

from __future__ import annotations

import asyncio
import weakref
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import grpc

from stagecoach.errors import Cancelled, from_rpc_error
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S
from stagecoach.v1.inference_pb2 import CancelRequest, GetClusterStatusRequest, ListModelsRequest
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_client.requests import GenerateOptions, Messages, generate_call, tokenize_request
from stagecoach_client.results import Generation, Tokenization, read_tokenization
from stagecoach_client.settings import (
    CANCEL_TIMEOUT_S,
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
    """Calls a router from one event loop; otherwise as Client, which see for the arguments.

    It may be made outside of the loop: it connects with its first call.
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
        self._channel = channel
        self._own_channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._peer = peer_name(target, channel)
        self._closed = asyncio.Event()
        self._streams: weakref.WeakSet[AsyncGenerationStream] = weakref.WeakSet()  # to end them with us

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
        """As Client.generate; `async for chunk in await client.generate(..., stream=True)`.

        When `stream`, it returns as soon as the request is on its way. Cancelling the task that waits for the answer
        cancels the request on the server.
        """
        call = generate_call(prompt, options)
        stub = self._connected()
        chunks = AsyncGenerationStream(
            lambda timeout_s: stub.Generate(
                call.request, timeout=timeout_s, wait_for_ready=False, metadata=self._settings.metadata
            ),
            lambda: stub.Cancel(
                CancelRequest(request_id=call.request.request_id),
                timeout=CANCEL_TIMEOUT_S,
                metadata=self._settings.metadata,
            ),
            call,
            self._settings.generate_attempts(call.timeout_s),
            self._peer,
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
        """What is served."""
        return read_models(await self._read("ListModels", ListModelsRequest(), timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """How the router and its pipelines are."""
        return read_status(await self._read("GetClusterStatus", GetClusterStatusRequest(), timeout_s))

    async def aclose(self) -> None:
        """Ends the calls that run or wait for their next attempt, and the connection."""
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

    def _connected(self) -> Any:
        """The stub. A channel of grpc.aio belongs to the loop it is made in, so it is made here and not earlier."""
        if self._closed.is_set():
            raise RuntimeError("this client has been closed")
        if self._stub is None:
            if self._channel is None:
                self._own_channel = self._channel = self._settings.async_channel()
            self._stub = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        return self._stub

    async def _read(self, method: str, request: Any, timeout_s: float | None) -> Any:
        attempts = self._settings.read_attempts(timeout_s)
        stub = self._connected()
        while True:
            try:
                return await getattr(stub, method)(
                    request, timeout=attempts.remaining_s(), wait_for_ready=False, metadata=self._settings.metadata
                )
            except grpc.RpcError as failure:
                error = from_rpc_error(failure, self._peer)
                delay_s = attempts.delay_s(error)
                if delay_s is None:
                    raise error from failure
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise Cancelled("the client was closed during the call") from None
            await wait_for_event(self._closed, delay_s)
            if self._closed.is_set():
                raise Cancelled("the client was closed during the call")

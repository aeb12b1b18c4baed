"""Both clients behind one interface, that of AsyncClient, so that what they promise is stated and tested once.

The async client is used as it is. Each call of the blocking one runs in a thread, as it would in a program that has
several of them; so what a test does beside a call comes from another thread, or from another task.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from stagecoach_client import AsyncClient, Chunk, Client, ClusterStatus, Generation, GenerationStream, Tokenization
from stagecoach_client.status import Model

NUM_THREADS = 16

# Runs a blocking call in a thread, and awaits its result.
Run = Callable[..., Any]


class ThreadedClient:
    """A Client with the interface of an AsyncClient."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._client = Client(*arguments, **options)
        self._threads = ThreadPoolExecutor(NUM_THREADS)

    async def generate(
        self, prompt: str | None = None, *, stream: bool = False, **options: Any
    ) -> Generation | ThreadedStream:
        answer = await self._run(self._client.generate, prompt, stream=stream, **options)
        return ThreadedStream(answer, self._run) if stream else answer

    async def tokenize(self, *arguments: Any, **options: Any) -> Tokenization:
        return await self._run(self._client.tokenize, *arguments, **options)

    async def models(self) -> tuple[Model, ...]:
        return await self._run(self._client.models)

    async def status(self) -> ClusterStatus:
        return await self._run(self._client.status)

    async def aclose(self) -> None:
        await self._run(self._client.close)

    async def __aenter__(self) -> ThreadedClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()
        self._threads.shutdown(wait=False)

    async def _run(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, functools.partial(call, *arguments, **options)
        )


class ThreadedStream:
    """A GenerationStream with the interface of an AsyncGenerationStream."""

    def __init__(self, stream: GenerationStream, run: Run) -> None:
        self._stream = stream
        self._run = run

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    def __aiter__(self) -> ThreadedStream:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self._run(next, self._stream, None)  # a StopIteration cannot leave a thread's future
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def collect(self) -> Generation:
        return await self._run(self._stream.collect)

    async def aclose(self) -> None:
        await self._run(self._stream.close)

    async def __aenter__(self) -> ThreadedStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()


EitherClient = AsyncClient | ThreadedClient


@dataclass(frozen=True)
class Kind:
    """One of the two clients."""

    connect: Callable[..., EitherClient]  # takes what Client and AsyncClient take
    channel: Callable[[str], AbstractAsyncContextManager[Any]]  # a plain one to an address, for `connect(channel=...)`


@contextlib.asynccontextmanager
async def _blocking_channel(address: str) -> AsyncIterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


KINDS = {
    "sync": Kind(ThreadedClient, _blocking_channel),
    "async": Kind(AsyncClient, grpc.aio.insecure_channel),
}

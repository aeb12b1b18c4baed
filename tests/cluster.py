"""A whole cluster on one event loop: real shards, a real router, real gRPC on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecoach.errors import Unavailable
from stagecoach_client import AsyncClient, ClusterStatus
from stagecoach_router import server as router
from stagecoach_router.settings import RouterSettings
from stagecoach_shard import server as shard
from stagecoach_shard.settings import ShardSettings

READY_TIMEOUT_S = 60.0
# A shard that cannot stop loading in this time ends its process at once, with status 0. Here that is the process of the
# tests, and on a busy machine a second is soon over.
shard.ABANDON_TIMEOUT_S = READY_TIMEOUT_S


# Below the range out of which systems give ports to whoever asks for any one, and to outgoing connections: so nobody
# gets one of these by chance between our look at it and its use.
_PORT_RANGE = range(20_000, 30_000)
_BLOCK_SIZE = 100


def _own_ports() -> Iterator[int]:
    """Ports that no other process takes from here: tests run in several at once.

    Whoever has the first port of a block bound for UDP, which nothing here speaks, owns all ports of the block for TCP.
    """
    claims = []
    while True:
        claim = socket.socket(type=socket.SOCK_DGRAM)
        first = random.SystemRandom().choice(_PORT_RANGE[::_BLOCK_SIZE])
        try:
            claim.bind(("127.0.0.1", first))
        except OSError:
            claim.close()
            continue
        claims.append(claim)  # bound as long as this process lives
        yield from range(first, first + _BLOCK_SIZE)


_PORTS = _own_ports()


def free_port() -> int:
    """A port that nobody listens on, and that this function gives only once, to this process only."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the count has no end")


@dataclass
class Running:
    """A server on this event loop."""

    address: str
    stop: asyncio.Event
    task: asyncio.Task[None]

    async def close(self) -> None:
        self.stop.set()
        await self.task


def start_shard(model: Path, layers: str, **settings: Any) -> Running:
    address = settings.pop("listen", None) or f"127.0.0.1:{free_port()}"
    facts: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "4M", "drain_timeout_s": 0.0} | settings
    stop = asyncio.Event()
    task = asyncio.create_task(shard.serve(ShardSettings(model=model, layers=layers, listen=address, **facts), stop))
    return Running(address, stop, task)


def start_router(shards: Sequence[str], **settings: Any) -> Running:
    address = settings.pop("listen", None) or f"127.0.0.1:{free_port()}"
    facts: dict[str, Any] = {"drain_timeout_s": 0.0} | settings
    stop = asyncio.Event()
    task = asyncio.create_task(router.serve(RouterSettings(shards=",".join(shards), listen=address, **facts), stop))
    return Running(address, stop, task)


async def wait_until_ready(client: AsyncClient, *running: Running) -> None:
    """Returns when the router has a pipeline; raises what ended a server that ended before."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while not await _is_ready(client):
            for server in running:
                if server.task.done():
                    server.task.result()
            await asyncio.sleep(0.02)


async def _is_ready(client: AsyncClient) -> bool:
    try:
        return any(pipeline.ready for pipeline in (await client.status()).pipelines)
    except Unavailable:  # it does not listen yet
        return False


async def status_becomes(client: AsyncClient, holds: Callable[[ClusterStatus], bool]) -> ClusterStatus:
    """The router's status, once `holds(status)`. One that does not listen yet is waited for."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            with contextlib.suppress(Unavailable):
                if holds(status := await client.status()):
                    return status
            await asyncio.sleep(0.01)


@asynccontextmanager
async def cluster(
    model: Path,
    ranges: Sequence[str] = ("0:2", "2:4"),
    *,
    shard_settings: dict[str, Any] | None = None,
    **router_settings: Any,
) -> AsyncIterator[AsyncClient]:
    """A client of a cluster that is ready."""
    shards = [start_shard(model, layers, **(shard_settings or {})) for layers in ranges]
    front = start_router([server.address for server in shards], **router_settings)
    client = AsyncClient(front.address, max_retries=0)
    try:
        await wait_until_ready(client, front, *shards)
        yield client
    finally:
        await client.aclose()
        for server in (front, *shards):
            await server.close()

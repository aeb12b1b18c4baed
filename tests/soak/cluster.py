"""A cluster of real processes that a test may kill, stop and cut off."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagecoach.errors import StagecoachError
from stagecoach_client import AsyncClient
from tests.cluster import free_port
from tests.delay_proxy import DelayProxy
from tests.soak.failure import Failed
from tests.soak.supervised import Supervised

START_TIMEOUT_S = 120.0
READ_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is started: a shard for each of `layers` ("0:2", or "auto" for one without layers of its own), a router.

    More shards than one pipeline needs are spares or further pipelines; the router is told of all of them.
    """

    model: Path
    layers: Sequence[str]
    shard_flags: Sequence[str] = ()
    router_flags: Sequence[str] = ()
    proxied: frozenset[int] = frozenset()  # shards that are reached through a proxy only, which can be stalled


class Cluster:
    """A deployment that runs. `proxies` are those of the proxied shards, by the shard's index."""

    def __init__(
        self, layers: Sequence[str], shards: list[Supervised], router: Supervised, proxies: dict[int, DelayProxy]
    ) -> None:
        self.layers = layers
        self.shards = shards
        self.router = router
        self.address = router.address
        self.proxies = proxies

    @property
    def processes(self) -> list[Supervised]:
        return [*self.shards, self.router]

    @property
    def spares(self) -> list[Supervised]:
        """Shards that have no layers of their own."""
        return [shard for shard, layers in zip(self.shards, self.layers, strict=True) if layers == "auto"]

    def check(self) -> None:
        """Raises ProcessDied where one has ended that nobody killed."""
        for process in self.processes:
            process.check()

    def tracebacks(self) -> list[str]:
        """What no process may ever print."""
        return [
            f"{process.name}: {line}"
            for process in self.processes
            for line in process.lines
            if "Traceback" in line or "Task exception was never retrieved" in line
        ]

    async def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when the router has a pipeline through which a token came. Raises ProcessDied and TimeoutError."""
        async with asyncio.timeout(timeout_s), AsyncClient(self.address, max_retries=0) as client:
            while True:
                self.check()
                with contextlib.suppress(StagecoachError):  # the router does not listen yet
                    if (await client.status(timeout_s=READ_TIMEOUT_S)).ready:
                        return
                await asyncio.sleep(POLL_INTERVAL_S)


@contextlib.asynccontextmanager
async def running(deployment: Deployment) -> AsyncIterator[Cluster]:
    """The cluster, once it is ready; its processes end with the block, whatever state they are in."""
    async with contextlib.AsyncExitStack() as stack:
        shards, addresses, proxies = [], [], {}
        for index, layers in enumerate(deployment.layers):
            address = f"127.0.0.1:{free_port()}"
            command = [sys.executable, "-m", "stagecoach_shard", "--model", str(deployment.model), "--layers", layers]
            command += ["--listen", address, *deployment.shard_flags]
            shards.append(Supervised(f"shard {index} ({layers})", address, command))
            if index in deployment.proxied:
                proxies[index] = await stack.enter_async_context(DelayProxy(address))
                address = proxies[index].address
            addresses.append(address)
        address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "stagecoach_router", "--shards", ",".join(addresses), "--listen", address]
        router = Supervised("router", address, [*command, *deployment.router_flags])
        cluster = Cluster(deployment.layers, shards, router, proxies)
        for process in cluster.processes:
            stack.callback(process.close)
            process.start()
        await cluster.wait_until_ready()
        yield cluster


async def check_nothing_is_left(cluster: Cluster, client: AsyncClient) -> None:
    """Raises Failed unless the cluster is idle and whole, and has printed no traceback."""
    await cluster.wait_until_ready()
    status = await client.status()
    if (status.num_running, status.num_waiting) != (0, 0):
        raise Failed(f"{status.num_running} sequences run and {status.num_waiting} wait")
    if status.num_free_blocks != status.num_blocks:
        raise Failed(f"{status.num_free_blocks} of {status.num_blocks} blocks are free")
    if tracebacks := cluster.tracebacks():
        raise Failed("; ".join(tracebacks))

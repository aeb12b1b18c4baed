"""Faults from outside, one at a time: which one, to whom and for how long is drawn."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from tests.delay_proxy import Direction
from tests.soak.cluster import Cluster
from tests.soak.supervised import kill_and_restart

DIRECTIONS: Sequence[Direction] = ("to_target", "from_target")


class Faults:
    """Of one cluster, whose `--fault-timeout-s` is given: what stands still does so for up to three times as long.

    `spared` shards and, with `spare_router`, the router are not killed: their memory is being watched.
    """

    def __init__(self, cluster: Cluster, fault_timeout_s: float, dice: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self.spared: frozenset[int] = frozenset()
        self.spare_router = False
        self._cluster = cluster
        self._max_pause_s = 3 * fault_timeout_s
        self._dice = dice

    async def strike(self) -> str:
        """One fault, from its beginning to its end; what it was. Whether things are well again is not waited for."""
        kinds: list[Callable[[], Awaitable[str]]] = [self._kill, self._kill, self._stop]
        if not self.spared:
            kinds.append(self._kill_all_shards)
        if self._cluster.proxies:
            kinds.append(self._stall)
        if not self.spare_router:
            kinds.append(self._kill_router)
        name = await self._dice.choice(kinds)()
        self.counts[name] += 1
        return name

    async def _kill(self) -> str:
        kill_and_restart(self._dice.choice([self._cluster.shards[index] for index in self._mortal()]))
        return "shard killed"

    async def _kill_all_shards(self) -> str:
        kill_and_restart(*self._cluster.shards)
        return "all shards killed"

    async def _kill_router(self) -> str:
        kill_and_restart(self._cluster.router)
        return "router killed"

    async def _stop(self) -> str:
        shard = self._dice.choice(self._cluster.shards)
        shard.signal(signal.SIGSTOP)
        try:
            await self._a_while()
        finally:
            shard.signal(signal.SIGCONT)
        return "shard stopped"

    async def _stall(self) -> str:
        proxy = self._dice.choice(list(self._cluster.proxies.values()))
        directions = self._dice.choice([DIRECTIONS[:1], DIRECTIONS[1:], DIRECTIONS])
        for direction in directions:
            proxy.stall(direction)
        try:
            await self._a_while()
        finally:
            for direction in directions:
                proxy.resume(direction)
        return "link stalled"

    def _mortal(self) -> list[int]:
        return [index for index in range(len(self._cluster.shards)) if index not in self.spared]

    async def _a_while(self) -> None:
        await asyncio.sleep(self._dice.uniform(0.1, self._max_pause_s))

"""A soak from its start to its verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagecoach_client import AsyncClient
from tests.soak.callers import Load
from tests.soak.cluster import Cluster, Deployment, check_nothing_is_left, running
from tests.soak.failure import Failed
from tests.soak.faults import Faults
from tests.soak.mixed_requests import with_answers
from tests.soak.resources import (
    MAX_GROWTH_BYTES,
    MAX_REMEMBERED_BYTES,
    REMEMBERS_FOR_S,
    Resources,
    growth,
    read_resources,
)
from tests.soak.supervised import Supervised

LAYERS = ("0:2", "2:4")
FAULT_TIMEOUT_S = 2.0
REPORT_INTERVAL_S = 10.0
NUM_REQUESTS = 45
# In each half, however short it is.
MIN_FAULTS = 2
# Between two faults, beside the time until the cluster is ready and tokens have come again.
MAX_QUIET_S = 3.0
MIN_TOKENS_BETWEEN = 300
RECOVERY_TIMEOUT_S = 90.0
# The stale sessions of a shard that was cut off end after twice the fault timeout.
SETTLE_S = 2 * FAULT_TIMEOUT_S + 1.0
NUM_SHOWN_LINES = 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What a soak is to be."""

    duration_s: float
    seed: int
    num_callers: int
    num_replicas: int = 1
    num_spares: int = 0

    def deployment(self, model: Path, journal: Path) -> Deployment:
        layers = [*LAYERS * self.num_replicas, *["auto"] * self.num_spares]
        router_flags = ["--journal", str(journal), "--fault-timeout-s", f"{FAULT_TIMEOUT_S:g}"]
        router_flags += ["--max-batch-tokens", "128"]
        shard_flags = ["--dtype", "float32", "--kv-cache-memory", "2M"]  # little, so that sequences are preempted
        return Deployment(model, layers, shard_flags, router_flags, proxied=frozenset({1}))


async def soak(plan: Plan, model: Path, say: Callable[[str], None]) -> None:
    """Raises Failed with what was lost, wrong or left over. `say` gets a line every ten seconds, and a table."""
    dice = random.Random(plan.seed)
    async with running(plan.deployment(model, model / "journal.sqlite")) as cluster:
        async with AsyncClient(cluster.address) as client:
            requests = await with_answers(client, NUM_REQUESTS, prompt_words=(3, 55), max_tokens=(20, 150))
        load = Load(cluster.address, requests, plan.num_callers, plan.seed)
        run = _Run(cluster, load, Faults(cluster, FAULT_TIMEOUT_S, dice), dice, say)
        try:
            await run.whole(plan.duration_s)
        except (Failed, TimeoutError) as error:
            log = "".join(f"\n  {line}" for line in cluster.router.lines[-NUM_SHOWN_LINES:])
            raise Failed(f"{error or 'out of time'}; {run.state()}; the router's last lines:{log}") from error
        finally:
            await load.stop()


class _Run:
    def __init__(
        self, cluster: Cluster, load: Load, faults: Faults, dice: random.Random, say: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._load = load
        self._faults = faults
        self._dice = dice
        self._say = say
        self._began_s = time.monotonic()
        self._router_began_s = self._began_s

    async def whole(self, duration_s: float) -> None:
        reporting = asyncio.create_task(self._report())
        try:
            await self._strike_until(self._began_s + duration_s / 2)
            self._faults.spared, self._faults.spare_router = frozenset({0}), True
            before = await self._settled()
            may_remember = time.monotonic() - self._router_began_s < REMEMBERS_FOR_S
            self._load.resume()
            await self._strike_until(self._began_s + duration_s)
            after = await self._settled()
        finally:
            reporting.cancel()
        async with AsyncClient(self._cluster.address) as client:
            await check_nothing_is_left(self._cluster, client)
        self._table(before, after)
        max_bytes = MAX_GROWTH_BYTES + (MAX_REMEMBERED_BYTES if may_remember else 0)
        if grown := growth(before, after, max_bytes=max_bytes):
            raise Failed("; ".join(grown))

    async def _strike_until(self, end_s: float) -> None:
        """Faults, each when the cluster has got over the last one; MIN_FAULTS also past `end_s`."""
        enough_faults = self._faults.counts.total() + MIN_FAULTS
        while time.monotonic() < end_s or self._faults.counts.total() < enough_faults:
            await self._check_for(self._dice.uniform(0.0, MAX_QUIET_S))
            name = await self._faults.strike()
            if name == "router killed":
                self._router_began_s = time.monotonic()
            await self._cluster.wait_until_ready(RECOVERY_TIMEOUT_S)
            enough = self._load.tally.num_tokens + MIN_TOKENS_BETWEEN
            async with asyncio.timeout(RECOVERY_TIMEOUT_S):
                while self._load.tally.num_tokens < enough:
                    await self._check_for(0.05)

    async def _check_for(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        while True:
            self._load.check()
            self._cluster.check()
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, 0.1))

    async def _settled(self) -> list[Resources]:
        """Of what is watched, while nobody calls."""
        await self._load.pause()
        await self._cluster.wait_until_ready()
        await asyncio.sleep(SETTLE_S)
        return [read_resources(process) for process in self._watched()]

    def _watched(self) -> list[Supervised]:
        return [self._cluster.router, self._cluster.shards[0]]

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._say(self.state())

    def state(self) -> str:
        """One line."""
        tally = self._load.tally
        return (
            f"{time.monotonic() - self._began_s:5.0f} s: {tally.ended.total()} calls, {tally.num_tokens} tokens, "
            f"{tally.retries.total()} retries, {self._faults.counts.total()} faults; "
            + ", ".join(str(read_resources(process)) for process in self._watched())
        )

    def _table(self, before: Sequence[Resources], after: Sequence[Resources]) -> None:
        tally = self._load.tally
        groups: dict[str, Counter[str]] = {
            "calls": tally.ended,
            "retries": tally.retries,
            "faults": self._faults.counts,
        }
        for title, counts in groups.items():
            for name, count in sorted(counts.items()):
                self._say(f"{title:<8} {name:<20} {count:>8}")
        for one, other in zip(before, after, strict=True):
            self._say(f"{one} -> {other}")

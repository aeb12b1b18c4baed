"""`python -m tests.soak.frequent_kills --model DIR --seconds N --every N`: streams get on while stages keep dying.

A cluster as `stagecoach up --spares 1` makes it, in float32, with its own supervisor. Eight streams run at a time, the
next as soon as one ends. Every few seconds a random stage, of the pipeline that is open then or was last, is killed
with SIGKILL, however far the recovery from the kill before has come. Each stream has to end with the tokens of an
undisturbed run, and tokens have to come all the while: the longest time without one is the figure that counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stagecoach.errors import StagecoachError
from stagecoach_client import AsyncClient
from stagecoach_local import LocalCluster
from tests.soak.failure import Failed

VICTIMS = ("stage", "any")
OUTPUT_TOKENS = 100
PROMPTS = ("the coach rolled on", "seven horses", "rain fell on", "a stone", "nobody knew", "each night", "once", "it")
# What is longer than this counts as no progress.
MAX_SILENCE_S = 10.0
MAX_DETECTION_S = 0.15
FINISH_TIMEOUT_S = 120.0
NUM_SHOWN_LINES = 60


@dataclass
class Tally:
    """What happened. Times are time.monotonic()'s."""

    num_exact: int = 0  # streams with the tokens of an undisturbed run
    failures: Counter[str] = field(default_factory=Counter)  # of the others, by what became of them
    kills_s: list[float] = field(default_factory=list)
    detections_s: list[float] = field(default_factory=list)  # how long each took, of kills while the router was ready
    arrivals_s: list[float] = field(default_factory=list)  # of every token, and when it began and ended
    num_restarts: int = 0

    @property
    def longest_silence_s(self) -> float:
        return max(after - before for before, after in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))

    def __str__(self) -> str:
        failures = ", ".join(f"{count} {name}" for name, count in self.failures.most_common()) or "none"
        seconds = self.arrivals_s[-1] - self.arrivals_s[0]
        text = (
            f"{len(self.kills_s)} kills, {self.num_restarts} restarts in {seconds:.0f} s; {self.num_exact} streams "
            f"exact, {failures} failed; {len(self.arrivals_s) - 2} tokens, none for {self.longest_silence_s:.1f} s"
        )
        if not self.detections_s:
            return text
        return text + (
            f"; {len(self.detections_s)} kills noticed after {1e3 * statistics.median(self.detections_s):.0f} ms "
            f"in the median, {1e3 * max(self.detections_s):.0f} ms at most"
        )

    def check(self) -> None:
        """Raises Failed for what must not be."""
        wrong = []
        if self.failures:
            wrong.append("streams failed")
        if self.longest_silence_s > MAX_SILENCE_S:
            wrong.append(f"no token for more than {MAX_SILENCE_S:g} s")
        if not self.detections_s or statistics.median(self.detections_s) > MAX_DETECTION_S:
            wrong.append(f"kills are not noticed within {MAX_DETECTION_S:g} s")
        if wrong:
            raise Failed(f"{' and '.join(wrong)}: {self}")


class Streams:
    """Runs one request after the other for each of PROMPTS, until it is told to finish."""

    def __init__(self, client: AsyncClient, expected: dict[str, list[int]], tally: Tally) -> None:
        self._client = client
        self._tally = tally
        self._is_over = False
        self._tasks = [asyncio.create_task(self._repeat(prompt, ids)) for prompt, ids in expected.items()]

    async def finish(self) -> None:
        """Returns when those that run have ended."""
        self._is_over = True
        done, pending = await asyncio.wait(self._tasks, timeout=FINISH_TIMEOUT_S)
        self._tally.failures["not ended"] += len(pending)
        self._tally.failures += Counter()  # drops a count of zero
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()

    async def _repeat(self, prompt: str, expected: list[int]) -> None:
        while True:
            token_ids: list[int] = []
            try:
                async for chunk in await self._client.generate(prompt, stream=True, **_options()):
                    token_ids += chunk.token_ids
                    self._tally.arrivals_s += [time.monotonic()] * len(chunk.token_ids)
            except StagecoachError as error:
                self._tally.failures[type(error).__name__] += 1
            else:
                if token_ids == expected:
                    self._tally.num_exact += 1
                else:
                    self._tally.failures["wrong tokens"] += 1
            if self._is_over:
                return


class Killer:
    """Kills shards of a cluster, one after the other."""

    def __init__(self, cluster: LocalCluster, client: AsyncClient, tally: Tally, dice: random.Random) -> None:
        self._cluster = cluster
        self._client = client
        self._tally = tally
        self._dice = dice

    async def run(self, *, seconds: float, every_s: float, victims: str) -> None:
        next_s = time.monotonic() + every_s
        end_s = time.monotonic() + seconds
        while next_s < end_s:
            await asyncio.sleep(next_s - time.monotonic())
            next_s += every_s
            pids = await self._pids(victims)
            if pids:
                with contextlib.suppress(ProcessLookupError):  # its supervisor has yet to start it again
                    os.kill(self._dice.choice(pids), signal.SIGKILL)
                    self._tally.kills_s.append(time.monotonic())

    async def _pids(self, victims: str) -> list[int]:
        """Whom to choose from. A process that was started again is a stage when a pipeline has been opened over it."""
        pids = [each.pid for each in self._cluster.processes if each.role != "router"]
        if victims == "any":
            return pids
        pipelines = (await self._client.status()).pipelines
        return [stage.pid for pipeline in pipelines for stage in pipeline.stages if stage.pid in pids]


async def note_detections(address: str, tally: Tally) -> None:
    """Notes how long after a kill the router says that it is not ready any more. Runs until cancelled."""
    was_ready, seen = True, 0
    async with grpc.aio.insecure_channel(address) as channel:
        async for answer in HealthStub(channel).Watch(HealthCheckRequest()):
            is_ready = answer.status == HealthCheckResponse.SERVING
            if was_ready and not is_ready and len(tally.kills_s) > seen:
                tally.detections_s.append(time.monotonic() - tally.kills_s[-1])
            seen = len(tally.kills_s)
            was_ready = is_ready


def _options() -> dict[str, object]:
    return {"max_tokens": OUTPUT_TOKENS, "temperature": 0.0, "ignore_eos": True}


async def survive(
    model: Path,
    *,
    seconds: float,
    every_s: float,
    seed: int,
    spares: int = 1,
    replicas: int = 1,
    victims: str = "stage",
    kv_cache_memory: str = "256M",
    say: Callable[[str], None] = lambda _: None,
) -> Tally:
    """The whole test, but for the judgement, which is Tally.check's."""
    tally = Tally()
    lines: list[str] = []
    restarts: list[str] = []
    began_s = time.monotonic()

    def hear(name: str, line: str) -> None:
        lines.append(f"{time.monotonic() - began_s:7.2f} {name}: {line}")

    def note(event: str) -> None:
        hear("supervisor", event)
        restarts.extend([event] * ("started again, pid" in event))

    cluster = LocalCluster(
        model,
        2,
        replicas=replicas,
        spares=spares,
        dtype="float32",
        kv_cache_memory=kv_cache_memory,
        threads_per_shard=1,
        restart=True,
        on_line=hear,
        on_event=note,
    )
    try:
        await asyncio.to_thread(cluster.start)
        async with AsyncClient(cluster.address) as client:
            quiet = await asyncio.gather(*(client.generate(prompt, **_options()) for prompt in PROMPTS))
            expected = {
                prompt: list(answer.completions[0].token_ids) for prompt, answer in zip(PROMPTS, quiet, strict=True)
            }
            noting = asyncio.create_task(note_detections(cluster.address, tally))
            tally.arrivals_s.append(time.monotonic())
            streams = Streams(client, expected, tally)
            try:
                killer = Killer(cluster, client, tally, random.Random(seed))
                await killer.run(seconds=seconds, every_s=every_s, victims=victims)
            finally:
                await streams.finish()
                tally.arrivals_s.append(time.monotonic())
                noting.cancel()
                await asyncio.gather(noting, return_exceptions=True)
            cluster.check()
    finally:
        await asyncio.to_thread(cluster.stop)
        for line in lines:
            say(line)
    tally.num_restarts = len(restarts)
    if tracebacks := [line for line in lines if "Traceback" in line or "never retrieved" in line]:
        raise Failed("; ".join(tracebacks))
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak.frequent_kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint, served in float32")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=2.0, help="seconds from one kill to the next")
    parser.add_argument("--spares", type=int, default=1, help="shards without layers of their own")
    parser.add_argument("--replicas", type=int, default=1, help="pipelines of two shards each")
    parser.add_argument("--victims", choices=VICTIMS, default="stage", help="who is killed: a stage, or any shard")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--verbose", action="store_true", help="show what all processes said")
    options = parser.parse_args(argv)
    try:
        tally = asyncio.run(
            survive(
                options.model,
                seconds=options.seconds,
                every_s=options.every,
                seed=options.seed,
                spares=options.spares,
                replicas=options.replicas,
                victims=options.victims,
                say=print if options.verbose else lambda _: None,
            )
        )
        tally.check()
    except (Failed, StagecoachError) as error:  # the latter: it did not even start
        print(f"error: seed {options.seed}: {error}", file=sys.stderr)
        return 1
    print(f"seed {options.seed}: {tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

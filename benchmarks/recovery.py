"""What the death of a stage costs running streams, by how long their contexts are.

Streams decode. One stage is killed (SIGKILL), and what is to take its place does: by default the same command, started
again at once, on the same port. The pause is what a client sees: the longest time between two tokens of any of its
streams. In it the router finds that the stage is gone (detect, from the kill on), the new process comes to serve
(restart, from the kill on), the router opens a pipeline anew (reopen, from then on), and computes the streams'
contexts again (replay, from then on until each of them has a new token). Beside it stands what the same contexts took
before anything broke (prefill, until each stream had its first token).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import grpc
import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from benchmarks import plots, report
from benchmarks.timed_request import only_model, random_tokens, timed_request
from stagecoach.errors import DeadlineExceeded, InternalError
from stagecoach_client import AsyncClient, Model
from stagecoach_local.layer_split import read_shape, split_layers
from tests.soak.cluster import Cluster, Deployment, running
from tests.soak.supervised import Supervised, kill_and_restart

NUM_STAGES = 2
POLL_INTERVAL_S = 0.01
TIMEOUT_S = 300.0
# Of each stream, before the kill and after it. One that comes right after it had been computed before, so several.
NUM_TOKENS_BEFORE = 8
NUM_TOKENS_AFTER = 4
# For what the first of the streams generates while the last one's prompt is computed.
MIN_ROOM_TOKENS = 1024
SHARD_FLAGS = ("--dtype", "bfloat16", "--threads", "1", "--kv-cache-memory", "1G")


@dataclass(frozen=True, slots=True)
class Rescue:
    """What takes a killed stage's place. `layers` are started beside those of one pipeline."""

    extra_pipelines: int = 0
    spares: int = 0
    restarts: bool = False  # the killed process, at once; else when the streams are through


RESCUES = {
    "restart": Rescue(restarts=True),
    "spare": Rescue(spares=1),
    "replica": Rescue(extra_pipelines=1),
}


@dataclass(frozen=True, slots=True)
class Pause:
    """Seconds. None: could not be seen, or is not part of this way to recover."""

    prefill_s: float  # until each stream had its first token, before anything broke
    pause_s: float
    detect_s: float | None
    restart_s: float | None
    reopen_s: float | None
    replay_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """The rounds of one case."""

    context_tokens: int
    num_streams: int
    killed_stage: int
    rounds: list[Pause]

    def median(self, name: str) -> float | None:
        values = [value for each in self.rounds if (value := getattr(each, name)) is not None]
        return statistics.median(values) if values else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.argument_parser(__doc__, rounds=3, model=True)
    parser.add_argument(
        "--with", dest="rescue", choices=sorted(RESCUES), default="restart", help="what takes its place"
    )
    parser.add_argument("--contexts", default="128,512,1024,2048,4096", help="tokens, of each stream")
    parser.add_argument("--streams", default="1,8", help="at a time")
    parser.add_argument("--kill", type=int, choices=range(NUM_STAGES), help="this stage only (default each)")
    arguments = report.parse(parser, argv)
    contexts = report.whole_numbers(arguments.contexts, "contexts")
    streams = report.whole_numbers(arguments.streams, "streams")
    layers = [str(part) for part in split_layers(NUM_STAGES, read_shape(arguments.model))]
    rescue = RESCUES[arguments.rescue]
    deployment = Deployment(
        arguments.model, [*layers * (1 + rescue.extra_pipelines), *["auto"] * rescue.spares], SHARD_FLAGS
    )
    stages = range(NUM_STAGES) if arguments.kill is None else [arguments.kill]
    cases = [Measured(*case, rounds=[]) for case in itertools.product(contexts, streams, stages)]
    asyncio.run(measure(deployment, rescue, cases, arguments.rounds))
    print(f"a killed stage, with {arguments.rescue}; seconds, medians of {arguments.rounds} rounds")
    names = [field.name for field in fields(Pause)]
    rows = [
        (
            f"{case.context_tokens} tokens, {case.num_streams} streams, stage {case.killed_stage}",
            *("-" if (value := case.median(name)) is None else value for name in names),
        )
        for case in cases
    ]
    report.print_table(("context", *(name.removesuffix("_s") for name in names)), rows)
    settings = {"model": arguments.model, "with": arguments.rescue, "contexts": contexts, "streams": streams}
    report.write(arguments, "recovery", settings=settings, results=cases)
    if arguments.plot:
        _plot(arguments, cases, streams)


async def measure(deployment: Deployment, rescue: Rescue, cases: Sequence[Measured], num_rounds: int) -> None:
    """Every case in each round, on one cluster that is whole before each of them; a round to warm up is left out."""
    contexts = [case.context_tokens for case in cases]
    async with running(deployment) as cluster, AsyncClient(cluster.address, max_retries=0) as client:
        model = await only_model(client, max(contexts) + MIN_ROOM_TOKENS)
        await _whole_again(cluster, client, rescue)
        await _kill_one(cluster, client, model, rescue, Measured(min(contexts), 1, 0, []))
        for _ in range(num_rounds):
            for case in cases:
                case.rounds.append(await _kill_one(cluster, client, model, rescue, case))


async def _kill_one(cluster: Cluster, client: AsyncClient, model: Model, rescue: Rescue, case: Measured) -> Pause:
    began_s = time.perf_counter()
    streams = [_Stream(client, model, case.context_tokens) for _ in range(case.num_streams)]
    seen = _Seen(client, cluster.address)
    watching = asyncio.create_task(seen.watch())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(*(stream.has(NUM_TOKENS_BEFORE) for stream in streams))
            victim = await _stage_at_work(cluster, client, case.killed_stage)
            victim.kill()
            killed_s = time.perf_counter()
            restart_s = await _restart(victim) - killed_s if rescue.restarts else None
            await asyncio.gather(*(stream.has_after(killed_s, NUM_TOKENS_AFTER) for stream in streams))
            await _stop(streams)
            if not rescue.restarts:
                await _restart(victim)
            await _whole_again(cluster, client, rescue)
    except TimeoutError as error:
        raise DeadlineExceeded(f"no recovery within {TIMEOUT_S:g} s", field="case", limit=TIMEOUT_S) from error
    finally:
        watching.cancel()
        await _stop(streams)
    gaps = [stream.longest_gap(killed_s) for stream in streams]
    back_s = max(end for _, end in gaps)
    detect_s = None if seen.detected_s is None else seen.detected_s - killed_s
    found_s = killed_s + (restart_s or detect_s or 0.0)  # what is to take the place, or that it has to be taken
    reopened_s = seen.reopened_s or found_s
    return Pause(
        prefill_s=max(stream.first_s for stream in streams) - began_s,
        pause_s=max(end - start for start, end in gaps),
        detect_s=detect_s,
        restart_s=restart_s,
        reopen_s=None if seen.reopened_s is None else reopened_s - found_s,
        replay_s=back_s - reopened_s,
    )


async def _whole_again(cluster: Cluster, client: AsyncClient, rescue: Rescue) -> None:
    """Returns when everything is as it was at first: shards without layers of their own are spare, and have some."""
    while True:
        status = await client.status()
        cluster.check()
        num_spares = sum(spare.has_layers and not spare.reason for spare in status.spares)
        num_ready = sum(pipeline.ready for pipeline in status.pipelines)
        if (num_ready, num_spares) == (1 + rescue.extra_pipelines, rescue.spares):
            serving = {stage.address for pipeline in status.pipelines for stage in pipeline.stages}
            borrowed = [shard for shard in cluster.spares if shard.address in serving]
            if not borrowed:
                return
            kill_and_restart(*borrowed)  # the one whose layers it has takes its place back
        await asyncio.sleep(POLL_INTERVAL_S)


async def _stage_at_work(cluster: Cluster, client: AsyncClient, stage: int) -> Supervised:
    """That stage of the pipeline that runs most of the sequences."""
    pipelines = [pipeline for pipeline in (await client.status()).pipelines if pipeline.ready]
    address = max(pipelines, key=lambda pipeline: pipeline.num_running).stages[stage].address
    [shard] = [shard for shard in cluster.shards if shard.address == address]
    return shard


async def _restart(victim: Supervised) -> float:
    """Starts the killed process again; when it was ready, in time.perf_counter()."""
    await asyncio.to_thread(victim.start)
    request = HealthCheckRequest()
    while True:
        victim.check()
        # A new channel each time: one that failed to connect would wait before it tries again.
        async with grpc.aio.insecure_channel(victim.address) as channel:
            with contextlib.suppress(grpc.RpcError):
                answer = await HealthStub(channel).Check(request, timeout=1.0)
                if answer.status == HealthCheckResponse.SERVING:
                    return time.perf_counter()
        await asyncio.sleep(POLL_INTERVAL_S)


class _Seen:
    """When the router has become not ready, and when a pipeline was open again after that; in time.perf_counter().

    A router that has another whole pipeline stays ready.
    """

    def __init__(self, client: AsyncClient, address: str) -> None:
        self.detected_s: float | None = None
        self.reopened_s: float | None = None
        self._client = client
        self._address = address

    async def watch(self) -> None:
        before = await self._epochs()
        async with grpc.aio.insecure_channel(self._address) as channel:
            async for answer in HealthStub(channel).Watch(HealthCheckRequest()):
                if answer.status == HealthCheckResponse.NOT_SERVING:
                    break
        self.detected_s = time.perf_counter()
        while self.reopened_s is None:
            if await self._epochs() != before:
                self.reopened_s = time.perf_counter()
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _epochs(self) -> list[int]:
        return [pipeline.epoch for pipeline in (await self._client.status()).pipelines]


class _Stream:
    """A request that goes on until it is stopped, and when its tokens came."""

    def __init__(self, client: AsyncClient, model: Model, context_tokens: int) -> None:
        self._arrivals: list[float] = []
        self._came = asyncio.Event()
        prompt = random_tokens(context_tokens, model)
        output_tokens = model.context_length - context_tokens
        self.task = asyncio.create_task(
            timed_request(client, model, prompt, output_tokens, lambda times: self._note(times.last_s))
        )
        self.task.add_done_callback(lambda _: self._came.set())

    async def has(self, count: int) -> None:
        """Returns when `count` tokens have come. Raises what ended the stream before."""
        while len(self._arrivals) < count:
            if self.task.done():
                self.task.result()
                raise InternalError(f"a stream ended after {len(self._arrivals)} tokens")
            self._came.clear()
            await self._came.wait()

    async def has_after(self, time_s: float, count: int) -> None:
        """The same, of those that came after that time."""
        await self.has(sum(arrival <= time_s for arrival in self._arrivals) + count)

    @property
    def first_s(self) -> float:
        return self._arrivals[0]

    def longest_gap(self, after_s: float) -> tuple[float, float]:
        """From one token to the next, of those that came after that time."""
        gaps = [gap for gap in itertools.pairwise(self._arrivals) if gap[1] > after_s]
        return max(gaps, key=lambda gap: gap[1] - gap[0])

    def _note(self, now_s: float) -> None:
        self._arrivals.append(now_s)
        self._came.set()


async def _stop(streams: Sequence[_Stream]) -> None:
    for stream in streams:
        stream.task.cancel()
    await asyncio.gather(*(stream.task for stream in streams), return_exceptions=True)


def _plot(arguments: argparse.Namespace, measured: Sequence[Measured], streams: Sequence[int]) -> None:
    series = {}
    for count, name in itertools.product(streams, ("pause_s", "replay_s")):
        points = []
        for context, cases in itertools.groupby(measured, key=lambda case: case.context_tokens):
            values = [case.median(name) for case in cases if case.num_streams == count]
            points.append((float(context), statistics.fmean(value for value in values if value is not None)))
        series[f"{name.removesuffix('_s')}, {count} streams"] = points
    plots.lines(
        arguments.plot,
        title=f"A killed stage, with {arguments.rescue} (mean of either stage)",
        series=series,
        x_label="tokens of context",
        y_label="seconds",
    )


if __name__ == "__main__":
    report.run(main)

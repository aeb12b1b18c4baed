"""Ten times more requests than a cluster can answer: what becomes of them, and what those notice that were let in.

First the capacity: as many callers as sequences may run, each with one request at a time. Then, for `--seconds`,
`--factor` times as many requests a second as were answered then, at random moments; some have deadlines shorter than
the line. Every request has to be answered, refused with a delay after which to come again, or ended by its own
deadline; the p99 inter-token latency of the answered ones may be at most twice that at capacity; memory and open files
stay flat; and afterwards nothing runs or waits, and all K/V blocks are free. Exit status 1 where one of that is broken.
Linux only.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from benchmarks.overload_callers import HANG_S, PATIENCE_S, Tally
from benchmarks.router_scaling import cpu_s
from benchmarks.timed_request import only_model
from stagecoach.errors import InternalError, InvalidArgument
from stagecoach_cli.load_figures import percentile
from stagecoach_client import AsyncClient
from stagecoach_local import LocalCluster
from stagecoach_local.commands import StagecoachCommands

MAX_P99_RATIO = 2.0
# Of each shard, 5,000 tokens of SmolLM2-135M. Its pages count as memory from when a block is first used.
KV_CACHE_MIB = 64
# Of one process under overload, from its beginning to the peak; of a shard, beside the K/V cache.
MAX_GROWTH_MIB = 64
# The same from the middle of the overload on, when the K/V cache has been used up.
MAX_LATE_GROWTH_MIB = 16
MAX_FD_GROWTH = 16
HASTY_FRACTION, HASTY_S = 0.1, 1.0
SAMPLE_INTERVAL_S = 0.25
IDLE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Commands:
    """The real cluster, with a router of few places."""

    inner: StagecoachCommands
    max_running: int
    max_waiting: int

    def shard(self, stage: int, layers: Any, address: str) -> Sequence[str]:
        return self.inner.shard(stage, layers, address)

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]:
        limits = ["--max-running", str(self.max_running), "--max-waiting", str(self.max_waiting)]
        return [*self.inner.router(shard_addresses, address), *limits]


@dataclass(slots=True)
class Footprint:
    """One process over time."""

    rss_bytes: list[int] = field(default_factory=list)
    num_fds: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def sample(self, pid: int) -> None:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        self.rss_bytes.append(pages * 4096)
        self.num_fds.append(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
        self.cpu_s.append(cpu_s(pid))

    def growth_mib(self, first: int = 0) -> float:
        """From sample `first` to the peak after it."""
        return (max(self.rss_bytes[first:]) - self.rss_bytes[first]) / 2**20


class Watch:
    """Samples processes, by name, while its `with` statement runs."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.footprints = {name: Footprint() for name in pids}
        self._pids = pids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _sample(self) -> None:
        for name, pid in self._pids.items():
            self.footprints[name].sample(pid)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            self._sample()

    def __enter__(self) -> Watch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()


@dataclass(slots=True)
class Round:
    """A phase each of capacity and overload."""

    capacity: Tally
    overload: Tally
    rate_per_s: float  # of requests sent under overload
    footprints: dict[str, Footprint]
    idle: bool  # afterwards

    @property
    def p99_ratio(self) -> float:
        if not self.overload.itl_s:
            return float("inf")
        return percentile(self.overload.itl_s, 99) / percentile(self.capacity.itl_s, 99)

    def broken(self, *, is_smoke: bool) -> list[str]:
        """The conditions that do not hold, in words. A smoke run is too short to judge latency and slow growth."""
        load, found = self.overload, []
        if load.num_hung:
            found.append(f"{load.num_hung} requests hung")
        found += [f"{count} requests ended with {what}" for what, count in load.others.items()]
        ended = load.num_answered + load.num_refused + load.num_expired + load.num_hung + sum(load.others.values())
        if ended != load.num_sent:
            found.append(f"{load.num_sent} requests were sent, {ended} ended")
        if self.p99_ratio > MAX_P99_RATIO and not is_smoke:
            found.append(f"p99 ITL is {self.p99_ratio:.2f} times that at capacity; at most {MAX_P99_RATIO:g}")
        for name, footprint in self.footprints.items():
            found += _not_flat(name, footprint, is_smoke=is_smoke)
        return found if self.idle else [*found, "something runs or waits, or holds blocks, after all calls have ended"]


def _not_flat(name: str, footprint: Footprint, *, is_smoke: bool) -> list[str]:
    found = []
    limit_mib = MAX_GROWTH_MIB + (KV_CACHE_MIB if name != "router" else 0)
    if footprint.growth_mib() > limit_mib:
        found.append(f"{name} grew by {footprint.growth_mib():.0f} MiB; at most {limit_mib}")
    late_mib = footprint.growth_mib(len(footprint.rss_bytes) // 2)
    if late_mib > MAX_LATE_GROWTH_MIB and not is_smoke:
        found.append(f"{name} grew by {late_mib:.0f} MiB from the middle on; at most {MAX_LATE_GROWTH_MIB}")
    if footprint.num_fds[-1] > footprint.num_fds[0] + MAX_FD_GROWTH:
        found.append(f"{name} has {footprint.num_fds[-1]} files open, {footprint.num_fds[0]} before")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.argument_parser(__doc__, rounds=1, model=True)
    parser.add_argument("--stages", default="2", help="a number, or layer ranges")
    parser.add_argument("--max-running", type=int, default=16)
    parser.add_argument("--max-waiting", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default 60)")
    parser.add_argument("--capacity-seconds", type=float, default=20.0, help="of load at capacity (default 20)")
    parser.add_argument("--factor", type=float, default=10.0, help="times capacity (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="for runs of seconds: judges neither latency nor slow growth"
    )
    arguments = report.parse(parser, argv)
    for name in ("seconds", "capacity_seconds", "factor"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise InvalidArgument(f"{name} must be above 0", field=name, value=getattr(arguments, name))
    num_shards = int(arguments.stages) if arguments.stages.isdigit() else arguments.stages.count(",") + 1
    inner = StagecoachCommands(
        arguments.model, num_shards=num_shards, threads_per_shard=1, kv_cache_memory=f"{KV_CACHE_MIB}M"
    )
    commands = Commands(inner, arguments.max_running, arguments.max_waiting)
    with LocalCluster(arguments.model, arguments.stages, commands=commands) as cluster:
        rounds = [measure(cluster, arguments, number) for number in range(arguments.rounds)]
    show(rounds)
    names = ("model", "stages", "max_running", "max_waiting", "prompt_tokens", "output_tokens", "seconds", "factor")
    report.write(
        arguments,
        "overload",
        settings={name: getattr(arguments, name) for name in (*names, "seed", "smoke")},
        results=[summary(each) for each in rounds],
    )
    if arguments.plot:
        draw(arguments.plot, rounds[-1], arguments.factor)
    broken = [text for each in rounds for text in each.broken(is_smoke=arguments.smoke)]
    if broken:
        raise InternalError("; ".join(broken))


def measure(cluster: LocalCluster, arguments: Any, number: int) -> Round:
    """One round; the first one warms up before."""
    vocab_size = asyncio.run(_vocab_size(cluster.address, arguments))

    def run(seconds: float, seed: str, *load: str) -> Tally:
        lengths = ("--prompt-tokens", str(arguments.prompt_tokens), "--output-tokens", str(arguments.output_tokens))
        options = ("--seconds", str(seconds), "--vocab-size", str(vocab_size), "--seed", seed)
        return callers(cluster.address, seconds, *load, *lengths, *options)

    at_capacity = ("--concurrency", str(arguments.max_running))
    if number == 0:
        run(min(5.0, arguments.capacity_seconds), f"{arguments.seed}01", *at_capacity)
    capacity = run(arguments.capacity_seconds, f"{arguments.seed}{number}2", *at_capacity)
    if not capacity.itl_s or not capacity.tokens_in_wall:
        raise InternalError("no request was answered at capacity")
    rate = arguments.factor * capacity.tokens_in_wall / arguments.output_tokens / capacity.wall_s
    hasty = ("--hasty-fraction", str(HASTY_FRACTION), "--hasty-s", str(HASTY_S))
    with Watch({process.name: process.pid for process in cluster.processes}) as watch:
        overload = run(arguments.seconds, f"{arguments.seed}{number}3", "--rate", str(rate), *hasty)
        idle = asyncio.run(_becomes_idle(cluster.address))
    return Round(capacity, overload, rate, watch.footprints, idle)


def callers(target: str, seconds: float, *options: str) -> Tally:
    """One load from a process of its own. Raises InternalError where that does not end well, or not at all."""
    command = [sys.executable, "-m", "benchmarks.overload_callers", target, *options]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=seconds + PATIENCE_S + 4 * HANG_S, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise InternalError(f"the callers' process: {error}", field="callers") from error
    return Tally(**json.loads(done.stdout))


async def _vocab_size(target: str, arguments: Any) -> int:
    async with AsyncClient(target, max_retries=0) as client:
        return (await only_model(client, arguments.prompt_tokens + arguments.output_tokens)).vocab_size


async def _becomes_idle(target: str) -> bool:
    """Whether all is free soon after the last call has ended."""
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    async with AsyncClient(target, max_retries=0) as client:
        while time.monotonic() < deadline_s:
            status = await client.status()
            if (status.num_running, status.num_waiting, status.num_free_blocks) == (0, 0, status.num_blocks):
                return True
            await asyncio.sleep(0.1)
    return False


def figures(tally: Tally) -> dict[str, float]:
    """What a phase comes to: requests a second, latencies in ms, what part of a core the callers took."""
    values = {
        "answered_tokens_per_s": tally.tokens_in_wall / tally.wall_s,
        "callers_core": tally.cpu_s / tally.wall_s,
        "refused_share": tally.num_refused / tally.num_sent,
    }
    for name, times_s in (("itl", tally.itl_s), ("ttft", tally.ttft_s), ("refusal", tally.refusal_s)):
        for percent in (50, 99):
            values[f"{name}_p{percent}_ms"] = 1e3 * percentile(times_s, percent) if times_s else float("nan")
    return values


def summary(each: Round) -> dict[str, object]:
    """A round without its single times."""
    lists = ("ttft_s", "itl_s", "refusal_s", "retry_after_s")
    counts = {name: value for name, value in asdict(each.overload).items() if name not in lists}
    hints_s = each.overload.retry_after_s
    return {
        "capacity": figures(each.capacity),
        "overload": figures(each.overload),
        "rate_per_s": each.rate_per_s,
        "goodput_of_capacity": figures(each.overload)["answered_tokens_per_s"]
        / figures(each.capacity)["answered_tokens_per_s"],
        "p99_itl_ratio": each.p99_ratio,
        "counts": counts,
        "retry_after_s": {str(p): percentile(hints_s, p) for p in (0, 50, 100)} if hints_s else {},
        "footprints": {name: asdict(footprint) for name, footprint in each.footprints.items()},
        "idle_afterwards": each.idle,
    }


def show(rounds: Sequence[Round]) -> None:
    """The tables of every round."""
    for each in rounds:
        at_capacity, beyond = figures(each.capacity), figures(each.overload)
        load, hints_s = each.overload, each.overload.retry_after_s or [float("nan")]
        print(f"{each.rate_per_s:.1f} requests a second")
        report.print_table(
            ("", "at capacity", "overload"), [(name, at_capacity[name], beyond[name]) for name in at_capacity]
        )
        print(f"p99 ITL, overload / capacity: {each.p99_ratio:.2f}")
        print(
            f"{load.num_sent} sent: {load.num_answered} answered, {load.num_refused} refused, {load.num_expired} "
            f"expired, {load.num_hung} hung, {sum(load.others.values())} else; come again in "
            f"{percentile(hints_s, 0):.1f} to {percentile(hints_s, 100):.1f} s, median {percentile(hints_s, 50):.1f}"
        )
        report.print_table(
            ("process", "RSS start MiB", "peak", "end", "files start", "peak", "end", "of a core"),
            [
                (
                    name,
                    *(value / 2**20 for value in (print_.rss_bytes[0], max(print_.rss_bytes), print_.rss_bytes[-1])),
                    *(print_.num_fds[0], max(print_.num_fds), print_.num_fds[-1]),
                    (print_.cpu_s[-1] - print_.cpu_s[0]) / load.wall_s,
                )
                for name, print_ in each.footprints.items()
            ],
        )


def draw(path: Path, each: Round, factor: float) -> None:
    """Latencies of what was answered, at capacity and beyond, and of refusals."""
    at_capacity, beyond = figures(each.capacity), figures(each.overload)
    names = ("itl_p50_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms")
    plots.grouped_bars(
        path,
        title=f"{factor:g} times capacity: {beyond['refused_share']:.0%} refused, the others' latency",
        groups=[name.removesuffix("_ms").replace("_", " ").upper() for name in names],
        series={
            "at capacity": [at_capacity[name] for name in names],
            "overload": [beyond[name] for name in names],
        },
        y_label="milliseconds",
        log_y=True,
    )


if __name__ == "__main__":
    report.run(main)

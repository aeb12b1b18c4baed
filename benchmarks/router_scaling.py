"""How many tokens a second one router gives to many streams, with shards that answer at once; and what that costs it.

Starts a stub shard, a router and callers, each a process of its own, and reads the router's processor time from the
system: tokens per second of processor time are what one core of the router is worth, wherever the others run. How much
of it each part takes is measured in another run, under a profiler. Steps by rows and context length are sent
one at a time (one lane), so that a step is all streams' next token. The candidates of the stub fit within their
log-sum-exp, so nothing has to be computed again for want of candidates. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from stagecoach.errors import ConfigError, Unavailable
from stagecoach_local import LocalCluster

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1},
}
PROMPT_TOKENS = 128
# Of one request; after it the stream sends another one.
OUTPUT_TOKENS = 3500
SETTLE_S = 0.5
START_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class StubCommands:
    """A stub shard, and a router; `router_module` names the router's."""

    model: Path
    lanes: int
    max_running: int
    router_module: tuple[str, ...] = ("stagecoach_router",)

    def shard(self, index: int, layers: object, address: str) -> Sequence[str]:
        return [sys.executable, "-m", "benchmarks.stub_shard", "--model", str(self.model), "--listen", address]

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]:
        command = [sys.executable, "-m", *self.router_module, "--shards", ",".join(shard_addresses)]
        command += ["--listen", address, "--lanes", str(self.lanes), "--max-running", str(self.max_running)]
        return [*command, "--log-level", "warning"]


@dataclass(frozen=True, slots=True)
class Reading:
    """Totals at one moment."""

    num_tokens: int
    num_responses: int
    time_s: float
    router_cpu_s: float


class Callers:
    """The process that keeps the streams open."""

    def __init__(self, target: str, num_streams: int, prompt_tokens: int, sampling: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.stream_callers", target, "--streams", str(num_streams)]
        full = {"ignore_eos": True, "max_tokens": OUTPUT_TOKENS, **sampling}
        command += ["--prompt-tokens", str(prompt_tokens), "--sampling", json.dumps(full)]
        self._num_streams = num_streams
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def counts(self) -> dict[str, Any]:
        """What has come. Raises Unavailable where a stream or the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable("the callers' process has ended", field="streams")
        counts: dict[str, Any] = json.loads(line)
        if counts["error"]:
            raise Unavailable(f"a stream has ended: {counts['error']}", field="streams")
        return counts

    def wait_until_started(self) -> None:
        """Returns when every stream has its first token."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.counts()["num_started"] < self._num_streams:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{self._num_streams} streams did not start in {START_TIMEOUT_S:g} s", field="streams"
                )
            time.sleep(POLL_INTERVAL_S)

    def __enter__(self) -> Callers:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def router_pid(cluster: LocalCluster) -> int:
    return next(process.pid for process in cluster.processes if process.role == "router")


def cpu_s(pid: int) -> float:
    """The processor time, user and system, of all threads of a process so far; Linux, man 5 proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def streams(
    commands: StubCommands, num_streams: int, prompt_tokens: int, sampling: dict[str, Any]
) -> Iterator[tuple[Callers, int]]:
    """Callers whose streams all run, and the router's process id."""
    with (
        LocalCluster(commands.model, 1, commands=commands) as cluster,
        Callers(cluster.address, num_streams, prompt_tokens, sampling) as callers,
    ):
        callers.wait_until_started()
        time.sleep(SETTLE_S)
        yield callers, router_pid(cluster)


def read(callers: Callers, pid: int) -> Reading:
    counts = callers.counts()
    return Reading(counts["num_tokens"], counts["num_responses"], counts["time_s"], cpu_s(pid))


def measure(callers: Callers, pid: int, window_s: float) -> dict[str, float]:
    """The figures of one window."""
    before = read(callers, pid)
    time.sleep(window_s)
    after = read(callers, pid)
    num_tokens = after.num_tokens - before.num_tokens
    wall_s, router_s = after.time_s - before.time_s, after.router_cpu_s - before.router_cpu_s
    if not num_tokens or not router_s:
        raise Unavailable("no token came while it was measured", field="window")
    return {
        "tokens_per_s": num_tokens / wall_s,
        "router_cores": router_s / wall_s,
        "tokens_per_router_core_s": num_tokens / router_s,
        "router_us_per_token": router_s / num_tokens * 1e6,
        "responses_per_token": (after.num_responses - before.num_responses) / num_tokens,
    }


def throughput(model: Path, sampling: str, num_streams: int, window_s: float, rounds: int) -> dict[str, object]:
    """The figures at `num_streams`, a list of rounds for each."""
    with streams(StubCommands(model, 2, num_streams), num_streams, PROMPT_TOKENS, SAMPLING[sampling]) as (callers, pid):
        windows = [measure(callers, pid, window_s) for _ in range(rounds)]
    return {name: report.summarize([window[name] for window in windows]) for name in windows[0]}


def parts(model: Path, sampling: str, num_streams: int, window_s: float) -> dict[str, float]:
    """Microseconds of processor time per token by part; "gRPC and event loop" is what the profiler does not see."""
    with tempfile.TemporaryDirectory() as folder, _one_core_left_free() as core:
        path = Path(folder) / "parts.json"
        commands = StubCommands(model, 2, num_streams, ("benchmarks.profiled_router", str(path), str(core)))
        with streams(commands, num_streams, PROMPT_TOKENS, SAMPLING[sampling]) as (callers, pid):
            before, tokens_before = _profile(path, pid), callers.counts()["num_tokens"]
            time.sleep(window_s)
            after, tokens_after = _profile(path, pid), callers.counts()["num_tokens"]
    scale = 1e6 / max(1, tokens_after - tokens_before)
    seconds = Counter(after["parts_s"])
    seconds.subtract(before["parts_s"])
    total_s = after["cpu_s"] - before["cpu_s"]
    seconds["gRPC and event loop"] = total_s - seconds.total()
    return {**{part: scale * taken_s for part, taken_s in (+seconds).most_common()}, "total": scale * total_s}


@contextlib.contextmanager
def _one_core_left_free() -> Iterator[int]:
    """A core that this process and those it starts do not use, unless there is only one."""
    cores = os.sched_getaffinity(0)
    core = max(cores)
    os.sched_setaffinity(0, cores - {core} or cores)
    try:
        yield core
    finally:
        os.sched_setaffinity(0, cores)


def _profile(path: Path, pid: int) -> dict[str, Any]:
    path.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise Unavailable("the router does not tell its profile", field="parts")
        time.sleep(POLL_INTERVAL_S)
    profile: dict[str, Any] = json.loads(path.read_text())
    return profile


def steps(model: Path, num_rows: int, context: int, window_s: float, rounds: int) -> dict[str, float]:
    """Microseconds of a step of `num_rows` greedy rows, each with at least `context` positions before it."""
    with streams(StubCommands(model, 1, num_rows), num_rows, context, SAMPLING["greedy"]) as (callers, pid):
        windows = [measure(callers, pid, window_s) for _ in range(rounds)]
    cost = statistics.median(window["router_us_per_token"] for window in windows)
    rate = statistics.median(window["tokens_per_s"] for window in windows)
    return {"rows": num_rows, "context": context, "router_us": cost * num_rows, "wall_us": 1e6 * num_rows / rate}


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.argument_parser(__doc__, rounds=3, model=True)
    parser.add_argument("--streams", type=int, default=256, help="at a time (default 256)")
    parser.add_argument("--window-s", type=float, default=3.0, help="seconds of one round (default 3)")
    parser.add_argument("--sampling", default=",".join(SAMPLING), help="ways of it to measure (default all)")
    parser.add_argument("--rows", default="1,4,16,64,256", help="of the steps")
    parser.add_argument("--contexts", default="128,1024,4096", help="of the steps, in tokens")
    parser.add_argument("--quick", action="store_true", help="throughput only, neither parts nor steps")
    arguments = report.parse(parser, argv)
    if not 1 <= arguments.streams <= 4096 or not 0 < arguments.window_s <= 600:
        raise ConfigError("streams: 1 to 4096; window-s: above 0, at most 600", field="streams")
    if sys.platform != "linux":
        raise ConfigError("processor time is read from /proc: this benchmark needs Linux", field="platform")
    kinds = arguments.sampling.split(",")
    if not set(kinds) <= set(SAMPLING):
        raise ConfigError(f"sampling: of {', '.join(SAMPLING)}; got {arguments.sampling!r}", field="sampling")
    rows, contexts = report.whole_numbers(arguments.rows, "rows"), report.whole_numbers(arguments.contexts, "contexts")
    model, window_s, rounds = arguments.model, arguments.window_s, arguments.rounds
    rates = {kind: throughput(model, kind, arguments.streams, window_s, rounds) for kind in kinds}
    _print_rates(rates)
    results: dict[str, object] = {"throughput": rates}
    if not arguments.quick:
        costs = {kind: parts(model, kind, arguments.streams, window_s) for kind in kinds}
        _print_parts(costs)
        sweep = [steps(model, num_rows, context, window_s / 2, rounds) for context in contexts for num_rows in rows]
        report.print_table(
            ("rows", "context", "router us/step", "router us/row", "wall us/step"),
            [[s["rows"], s["context"], s["router_us"], s["router_us"] / s["rows"], s["wall_us"]] for s in sweep],
        )
        results |= {"parts_us_per_token": costs, "steps": sweep}
        if arguments.plot:
            _draw(arguments.plot, sweep)
    report.write(
        arguments,
        "router_scaling",
        settings={"streams": arguments.streams, "window_s": window_s, "prompt_tokens": PROMPT_TOKENS},
        results=results,
    )


def _print_rates(rates: dict[str, dict[str, Any]]) -> None:
    columns = ("tokens_per_s", "tokens_per_router_core_s", "router_us_per_token", "router_cores", "responses_per_token")
    report.print_table(
        ("sampling", "tok/s", "tok/s per router core", "us/token", "router cores", "responses/token"),
        [[kind, *(rate[column]["median"] for column in columns)] for kind, rate in rates.items()],
    )


def _print_parts(costs: dict[str, dict[str, float]]) -> None:
    kinds = list(costs)
    print()
    report.print_table(
        ("us/token", *kinds), [[part, *(costs[kind].get(part, 0.0) for kind in kinds)] for part in costs[kinds[0]]]
    )
    print()


def _draw(path: Path, sweep: Sequence[dict[str, float]]) -> None:
    plots.lines(
        path,
        title="Router: processor time of a decode step",
        series={
            f"context {context:,}": [
                (step["rows"], step["router_us"] / 1000) for step in sweep if step["context"] == context
            ]
            for context in dict.fromkeys(step["context"] for step in sweep)
        },
        x_label="rows",
        y_label="ms",
    )


if __name__ == "__main__":
    report.run(main)

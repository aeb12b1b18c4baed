"""Shards that are far from each other: throughput and latency with 0, 1, 10 and 50 ms between any two machines.

Everything runs here; a proxy in a process of its own stands before each shard and delays both directions (the router to
the first stage, each stage to the next, the last one back to the router), also where the delay is 0. A round measures
every delay, one after the other, on one cluster, which has to notice each change by itself: a warm-up load goes first.

"tok/s" are generated tokens over the time after prefill with many requests at a time. With one request, the
time from token to token is to be what it takes at 0 ms plus the hops.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import plots, report
from stagecoach.errors import ConfigError, Unavailable
from stagecoach.topology import LayerRange
from stagecoach_cli.load import Load, run_load
from stagecoach_client import AsyncClient
from stagecoach_local import LocalCluster
from stagecoach_local.addresses import free_addresses
from stagecoach_local.commands import Commands, StagecoachCommands
from stagecoach_local.layer_split import read_shape, split_layers

PROMPT_TOKENS = 32
NUM_WARM_UP_TOKENS = 48  # enough steps for the router to have measured what they take now


class Proxies:
    """One before each shard, all in a process of their own."""

    def __init__(self, targets: Sequence[str]) -> None:
        self.addresses = free_addresses(["127.0.0.1:0"] * len(targets))
        pairs = [f"{listen}={target}" for listen, target in zip(self.addresses, targets, strict=True)]
        command = [sys.executable, "-m", "tests.delay_proxy", *pairs]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._expect("ready")

    def set_delay(self, delay_s: float) -> None:
        """Each way, from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{delay_s}\n")
        self._process.stdin.flush()
        self._expect("set")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _expect(self, answer: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if line != answer:
            raise Unavailable(f"the proxies ended: {answer!r} was expected, {line!r} came")


class FarCommands:
    """The commands of a local cluster, with the proxies' addresses for those of the shards."""

    def __init__(self, commands: Commands) -> None:
        self.proxies: Proxies | None = None
        self._commands = commands

    def shard(self, index: int, layers: LayerRange | None, address: str) -> Sequence[str]:
        return self._commands.shard(index, layers, address)

    def router(self, shard_addresses: Sequence[str], address: str) -> Sequence[str]:
        self.close()  # those of an attempt to start that failed
        self.proxies = Proxies(shard_addresses)
        return self._commands.router(self.proxies.addresses, address)

    def close(self) -> None:
        if self.proxies is not None:
            self.proxies.close()
            self.proxies = None


@dataclass(frozen=True, slots=True)
class Measured:
    """With one delay, by round."""

    delay_ms: float
    tokens_per_s: list[float]
    itl_s: list[float]  # the median of one request alone


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.argument_parser(__doc__, rounds=3, model=True)
    parser.add_argument("--stages", default="2", help="a number, or layer ranges")
    parser.add_argument("--delays-ms", default="0,1,10,50", help="each way, between any two; the first is compared to")
    parser.add_argument("--concurrency", type=int, default=32, help="of the many requests")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each request")
    arguments = report.parse(parser, argv)
    delays_ms = _delays(arguments.delays_ms)
    num_stages = len(split_layers(arguments.stages, read_shape(arguments.model)))
    commands = FarCommands(StagecoachCommands(arguments.model, num_shards=num_stages))
    try:
        with LocalCluster(arguments.model, arguments.stages, commands=commands) as cluster:
            assert commands.proxies is not None, "the router was started"
            results = asyncio.run(
                measure(
                    cluster.address,
                    commands.proxies,
                    delays_ms,
                    Load(arguments.concurrency, PROMPT_TOKENS, arguments.output_tokens),
                    arguments.rounds,
                )
            )
    finally:
        commands.close()
    rows = _rows(results, num_hops=num_stages + 1)
    print(f"{num_stages} stages, {num_stages + 1} hops, {arguments.concurrency} requests and one; medians of rounds")
    report.print_table(
        ("delay ms", "tok/s", "of the first", "one request: ITL ms", "of the first, and hops", "ratio"),
        [list(row.values()) for row in rows],
    )
    settings = ("model", "stages", "delays_ms", "concurrency", "output_tokens")
    report.write(
        arguments,
        "far_machines",
        settings={name: getattr(arguments, name) for name in settings},
        results={"table": rows, "rounds": results},
    )
    if arguments.plot:
        plots.grouped_bars(
            arguments.plot,
            title=f"{arguments.concurrency} requests on {num_stages} stages, far apart",
            groups=[f"{result.delay_ms:g} ms" for result in results],
            series={"tok/s": [float(row["tokens_per_s"]) for row in rows]},
            y_label="tokens per second",
        )


async def measure(target: str, proxies: Proxies, delays_ms: Sequence[float], load: Load, rounds: int) -> list[Measured]:
    """Every round all delays, one after the other."""
    results = [Measured(delay_ms, [], []) for delay_ms in delays_ms]
    async with AsyncClient(target, max_retries=0) as client:
        [model] = await client.models()

        async def run(concurrency: int, output_tokens: int) -> tuple[float, float]:
            part = Load(concurrency, load.prompt_tokens, output_tokens)
            seed = random.randrange(2**32)  # new prompts each time: the prefix cache is not to help
            result = await run_load(client, part, model=model.name, vocab_size=model.vocab_size, seed=seed)
            assert result.itl_s is not None, "more than one token"
            return result.decode_tokens_per_s or result.e2e_tokens_per_s, result.itl_s.p50

        for number in range(rounds):
            for measured in results:
                proxies.set_delay(measured.delay_ms / 1e3)
                await run(load.concurrency, NUM_WARM_UP_TOKENS)
                tokens_per_s, _ = await run(load.concurrency, load.output_tokens)
                _, itl_s = await run(1, load.output_tokens)
                measured.tokens_per_s.append(tokens_per_s)
                measured.itl_s.append(itl_s)
                print(f"round {number + 1}, {measured.delay_ms:g} ms: {tokens_per_s:.1f} tok/s", file=sys.stderr)
    return results


def _rows(results: Sequence[Measured], num_hops: int) -> list[dict[str, float]]:
    first = results[0]
    rows = []
    for result in results:
        tokens_per_s, itl_ms = statistics.median(result.tokens_per_s), 1e3 * statistics.median(result.itl_s)
        expected_ms = 1e3 * statistics.median(first.itl_s) + num_hops * (result.delay_ms - first.delay_ms)
        ratios = [ours / base for ours, base in zip(result.tokens_per_s, first.tokens_per_s, strict=True)]
        rows.append(
            {
                "delay_ms": result.delay_ms,
                "tokens_per_s": tokens_per_s,
                "ratio": statistics.median(ratios),
                "one_itl_ms": itl_ms,
                "one_expected_ms": expected_ms,
                "one_ratio": itl_ms / expected_ms,
            }
        )
    return rows


def _delays(text: str) -> list[float]:
    try:
        delays_ms = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"delays_ms: {text!r} is not a list of numbers", field="delays_ms", value=text) from error
    for delay_ms in delays_ms:
        if not 0 <= delay_ms <= 10_000:
            text = f"delays_ms: {delay_ms:g} is not in [0, 10000]"
            raise ConfigError(text, field="delays_ms", limit="[0, 10000]", value=delay_ms)
    return delays_ms


if __name__ == "__main__":
    report.run(main)

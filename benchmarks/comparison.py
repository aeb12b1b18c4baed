"""Our cluster and another engine on the same work, in turn, on this machine.

The work is that of `stagecoach bench`: requests that all come at the same time, each of 128 random prompt tokens and 64
new ones, greedy, end-of-sequence ignored, weights in bfloat16. Ours is two shard processes of one thread each and a
router, called over gRPC through the SDK. A side waits idle while it is the other's turn.

- e2e tok/s: generated tokens / wall time of the whole batch, prefill included.
- prefill tok/s: prompt tokens / wall time of the same batch with one new token per request.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from benchmarks import plots, report
from stagecoach_cli.load import Load, run_load
from stagecoach_cli.load_figures import LoadResult
from stagecoach_client import AsyncClient
from stagecoach_local import LocalCluster

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
OURS = "stagecoach"


@dataclass(frozen=True, slots=True)
class Figures:
    """What one engine did in one round at one concurrency."""

    prefill_tokens_per_s: float
    e2e_tokens_per_s: float


class Engine(Protocol):
    """One side; started by `__enter__`."""

    def run(self, concurrency: int) -> Figures: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Stagecoach:
    """Ours: a cluster of processes on this machine."""

    def __init__(self, model: Path, stages: str) -> None:
        self._cluster = LocalCluster(model, stages, threads_per_shard=1)

    def run(self, concurrency: int) -> Figures:
        prefill = asyncio.run(self._load(Load(concurrency, PROMPT_TOKENS, 1)))
        whole = asyncio.run(self._load(Load(concurrency, PROMPT_TOKENS, OUTPUT_TOKENS)))
        return Figures(prefill.prompt_tokens / prefill.wall_s, whole.e2e_tokens_per_s)

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.__exit__(kind, error, trace)

    async def _load(self, load: Load) -> LoadResult:
        async with AsyncClient(self._cluster.address) as client:
            [model] = await client.models()
            seed = random.randrange(2**32)  # new prompts each time: the prefix cache is not to help
            return await run_load(client, load, model=model.name, vocab_size=model.vocab_size, seed=seed)


Rounds = dict[int, dict[str, list[Figures]]]  # by concurrency and engine, one entry a round


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    parser = report.argument_parser(description, rounds=3, model=True)
    parser.add_argument("--concurrency", default="1,8,32", help="requests at a time (default 1,8,32)")
    parser.add_argument("--stages", default="2", help="of our pipeline: a number, or layer ranges (default 2)")
    return parser


def compare(arguments: argparse.Namespace, benchmark: str, peers: Mapping[str, Engine]) -> None:
    """Runs all sides in turn, prints and writes what came out."""
    concurrencies = report.whole_numbers(arguments.concurrency, "concurrency")
    with ExitStack() as stack:
        engines: dict[str, Engine] = {OURS: stack.enter_context(Stagecoach(arguments.model, arguments.stages))}
        for name, peer in peers.items():
            engines[name] = stack.enter_context(peer)
        measured = run_in_turn(engines, concurrencies, arguments.rounds)
    results = summarize(measured)
    _print(results)
    settings = {"stages": arguments.stages, "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    report.write(arguments, benchmark, settings=settings, results=results)
    if arguments.plot:
        medians = {
            name: [statistics.median(run.e2e_tokens_per_s for run in by_name[name]) for by_name in measured.values()]
            for name in engines
        }
        plots.grouped_bars(
            arguments.plot,
            title="Generated tokens per second, prefill included",
            groups=[f"{concurrency} at a time" for concurrency in concurrencies],
            series=medians,
            y_label="tokens / s",
        )


def run_in_turn(engines: Mapping[str, Engine], concurrencies: Sequence[int], rounds: int) -> Rounds:
    """Every engine at every concurrency, `rounds` times; once before, to warm up."""
    measured: Rounds = {concurrency: {name: [] for name in engines} for concurrency in concurrencies}
    for concurrency in concurrencies:
        for engine in engines.values():
            engine.run(concurrency)
    for _ in range(rounds):
        for concurrency in concurrencies:
            for name, engine in engines.items():
                measured[concurrency][name].append(engine.run(concurrency))
            latest = ", ".join(
                f"{name} {runs[-1].e2e_tokens_per_s:.1f}" for name, runs in measured[concurrency].items()
            )
            print(f"concurrency {concurrency}: e2e tok/s: {latest}", flush=True)
    return measured


def summarize(measured: Rounds) -> list[dict[str, object]]:
    """One entry for each concurrency and engine; ratios are ours / theirs, round by round."""
    results: list[dict[str, object]] = []
    for concurrency, by_name in measured.items():
        for name, runs in by_name.items():
            entry: dict[str, object] = {
                "concurrency": concurrency,
                "engine": name,
                "prefill_tokens_per_s": report.summarize([run.prefill_tokens_per_s for run in runs]),
                "e2e_tokens_per_s": report.summarize([run.e2e_tokens_per_s for run in runs]),
            }
            if name != OURS:
                pairs = list(zip(by_name[OURS], runs, strict=True))
                entry["prefill_ratio"] = report.summarize(
                    [ours.prefill_tokens_per_s / theirs.prefill_tokens_per_s for ours, theirs in pairs]
                )
                entry["e2e_ratio"] = report.summarize(
                    [ours.e2e_tokens_per_s / theirs.e2e_tokens_per_s for ours, theirs in pairs]
                )
            results.append(entry)
    return results


def _print(results: Sequence[Mapping[str, object]]) -> None:
    rows = []
    for entry in results:
        cells = [entry["concurrency"], entry["engine"]]
        cells += [_median(entry[name]) for name in ("prefill_tokens_per_s", "e2e_tokens_per_s")]
        cells += [_range(entry.get(name)) for name in ("prefill_ratio", "e2e_ratio")]
        rows.append(cells)
    print("\nmedians of rounds; ratios are ours / theirs, with the smallest and the largest of a round")
    report.print_table(("concurrency", "engine", "prefill tok/s", "e2e tok/s", "prefill ratio", "e2e ratio"), rows)


def _median(summary: object) -> float:
    assert isinstance(summary, dict)
    return float(summary["median"])


def _range(summary: object) -> str:
    if not isinstance(summary, dict):
        return ""
    return f"{summary['median']:.2f} ({summary['min']:.2f} to {summary['max']:.2f})"

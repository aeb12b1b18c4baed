"""What a long prompt does to the streams that run beside it, and they to it.

Some streams decode. For a while nothing else happens: quiet. Then a long prompt comes: the inter-token latencies of the
streams until its first token, beside the quiet ones; and its time to first token, beside that of another such prompt
that had the cluster for itself.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import plots, report
from benchmarks.timed_request import only_model, random_tokens, timed_request
from stagecoach.errors import InternalError
from stagecoach_cli.load_figures import RequestTimes, percentile
from stagecoach_client import AsyncClient, Model
from stagecoach_local import LocalCluster

STREAM_PROMPT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Round:
    """In seconds."""

    quiet_itl_p50_s: float
    quiet_itl_p99_s: float
    beside_itl_p50_s: float
    beside_itl_p99_s: float
    alone_ttft_s: float
    beside_ttft_s: float

    @property
    def p99_ratio(self) -> float:
        return self.beside_itl_p99_s / self.quiet_itl_p99_s


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.argument_parser(__doc__, rounds=3, model=True)
    parser.add_argument("--stages", default="2", help="a number, or layer ranges")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="of the long prompt")
    parser.add_argument("--quiet-tokens", type=int, default=96, help="of each stream, before it")
    arguments = report.parse(parser, argv)
    with LocalCluster(arguments.model, arguments.stages, threads_per_shard=1) as cluster:
        rounds = asyncio.run(
            measure(
                cluster.address, arguments.streams, arguments.prompt_tokens, arguments.quiet_tokens, arguments.rounds
            )
        )
    medians = {name: statistics.median(getattr(r, name) for r in rounds) for name in Round.__dataclass_fields__}
    ratios = [r.p99_ratio for r in rounds]
    print(f"{arguments.streams} streams, a prompt of {arguments.prompt_tokens} tokens; ms, medians of rounds")
    itl_ms = {
        name: [1e3 * medians[f"{name}_itl_{percent}_s"] for percent in ("p50", "p99")] for name in ("quiet", "beside")
    }
    report.print_table(("", "ITL p50", "ITL p99"), [(name, *values) for name, values in itl_ms.items()])
    print(f"p99 beside / quiet: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"TTFT of the prompt: {medians['alone_ttft_s']:.2f} s alone, {medians['beside_ttft_s']:.2f} s beside them")
    settings = ("model", "stages", "streams", "prompt_tokens", "quiet_tokens")
    report.write(
        arguments,
        "long_prompt",
        settings={name: getattr(arguments, name) for name in settings},
        results={"p99_ratio": report.summarize(ratios), "medians": medians, "rounds": rounds},
    )
    if arguments.plot:
        plots.grouped_bars(
            arguments.plot,
            title=f"{arguments.streams} streams beside a prompt of {arguments.prompt_tokens} tokens",
            groups=("ITL p50", "ITL p99"),
            series=itl_ms,
            y_label="milliseconds",
        )


async def measure(target: str, num_streams: int, prompt_tokens: int, quiet_tokens: int, num_rounds: int) -> list[Round]:
    """The rounds, after one that warms up and is left out."""
    async with AsyncClient(target, max_retries=0) as client:
        model = await only_model(client, prompt_tokens + 1)
        rounds = [await _round(client, model, num_streams, prompt_tokens, quiet_tokens) for _ in range(num_rounds + 1)]
    return rounds[1:]


async def _round(client: AsyncClient, model: Model, num_streams: int, prompt_tokens: int, quiet_tokens: int) -> Round:
    alone = await timed_request(client, model, random_tokens(prompt_tokens, model), 1)
    streams = [_Stream(client, model) for _ in range(num_streams)]
    try:
        for stream in streams:
            await stream.has(1)
        start = [stream.num_responses for stream in streams]
        for stream, count in zip(streams, start, strict=True):
            await stream.has(count + quiet_tokens)
        quiet_s = [gap for stream, count in zip(streams, start, strict=True) for gap in stream.gaps_s(after=count)]
        before = [stream.num_responses for stream in streams]
        prompt = await timed_request(client, model, random_tokens(prompt_tokens, model), 1)
        beside_s = [gap for stream, count in zip(streams, before, strict=True) for gap in stream.gaps_s(after=count)]
    finally:
        await asyncio.gather(*(stream.stop() for stream in streams))
    return Round(
        percentile(quiet_s, 50),
        percentile(quiet_s, 99),
        percentile(beside_s, 50),
        percentile(beside_s, 99),
        alone.first_s - alone.sent_s,
        prompt.first_s - prompt.sent_s,
    )


class _Stream:
    """A request that goes on until it is stopped, or the context is full."""

    def __init__(self, client: AsyncClient, model: Model) -> None:
        self._arrivals: list[float] = []
        self._wanted = 0
        self._came = asyncio.Event()
        prompt = random_tokens(STREAM_PROMPT_TOKENS, model)
        output_tokens = model.context_length - STREAM_PROMPT_TOKENS
        self._task = asyncio.create_task(timed_request(client, model, prompt, output_tokens, self._note))
        self._task.add_done_callback(lambda _: self._came.set())

    @property
    def num_responses(self) -> int:
        return len(self._arrivals)

    async def has(self, count: int) -> None:
        """Returns when `count` responses have come. Raises what ended the stream before."""
        self._wanted = count
        while self.num_responses < count:
            if self._task.done():
                self._task.result()
                raise InternalError(f"a stream ended after {self.num_responses} responses")
            self._came.clear()
            await self._came.wait()

    def gaps_s(self, after: int) -> list[float]:
        """Between the responses from number `after` on; seconds."""
        times = self._arrivals[after - 1 :]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _note(self, times: RequestTimes) -> None:
        self._arrivals.append(times.last_s)
        if self.num_responses >= self._wanted:
            self._came.set()


if __name__ == "__main__":
    report.run(main)

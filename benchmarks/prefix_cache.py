"""How much sooner a prompt's first token comes when its beginning was computed before.

Each round takes a new random prefix. The first request computes it; the second has the same prefix and another tail;
a third is a tail alone, which is what the second would cost if a prefix that is found were free. Time to first token as
the caller sees it, over gRPC, with nothing else running.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

from benchmarks import plots, report
from benchmarks.timed_request import only_model, random_tokens, timed_request
from stagecoach.errors import InternalError
from stagecoach_client import AsyncClient
from stagecoach_local import LocalCluster

FIRST, SECOND, TAIL_ONLY = "first", "prefix known", "tail alone"
NAMES = (FIRST, SECOND, TAIL_ONLY)
NUM_WARM_UP_ROUNDS = 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.argument_parser(__doc__, rounds=7, model=True)
    parser.add_argument("--stages", default="2", help="a number, or layer ranges")
    parser.add_argument("--prefix-tokens", type=int, default=1024)
    parser.add_argument("--tail-tokens", type=int, default=16)
    arguments = report.parse(parser, argv)
    with LocalCluster(arguments.model, arguments.stages, threads_per_shard=1) as cluster:
        ttft_s, cached = asyncio.run(
            measure(cluster.address, arguments.prefix_tokens, arguments.tail_tokens, arguments.rounds)
        )
    ratios = [first / second for first, second in zip(ttft_s[FIRST], ttft_s[SECOND], strict=True)]
    print(f"prefix {arguments.prefix_tokens} tokens, tail {arguments.tail_tokens}; {cached} found; medians of rounds")
    rows = [(name, *(1e3 * f(ttft_s[name]) for f in (statistics.median, min, max))) for name in NAMES]
    report.print_table(("request", "TTFT ms", "min", "max"), rows)
    print(f"{FIRST} / {SECOND}: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    report.write(
        arguments,
        "prefix_cache",
        settings={name: getattr(arguments, name) for name in ("model", "stages", "prefix_tokens", "tail_tokens")},
        results={
            "ttft_s": {name: report.summarize(ttft_s[name]) for name in NAMES},
            "ratio": report.summarize(ratios),
            "cached_tokens": cached,
        },
    )
    if arguments.plot:
        plots.grouped_bars(
            arguments.plot,
            title=f"Time to first token, prefix of {arguments.prefix_tokens} tokens",
            groups=NAMES,
            series={"TTFT": [1e3 * statistics.median(ttft_s[name]) for name in NAMES]},
            y_label="milliseconds",
        )


async def measure(target: str, prefix_tokens: int, tail_tokens: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """TTFT of each kind of request, in seconds, by round; and how many tokens each second request found."""
    ttft_s: dict[str, list[float]] = {name: [] for name in NAMES}
    cached: set[int] = set()
    async with AsyncClient(target, max_retries=0) as client:
        model = await only_model(client, prefix_tokens + tail_tokens + 1)
        for number in range(NUM_WARM_UP_ROUNDS + rounds):
            prefix = random_tokens(prefix_tokens, model)
            for name in NAMES:
                prompt = [*(prefix if name != TAIL_ONLY else []), *random_tokens(tail_tokens, model)]
                times = await timed_request(client, model, prompt, 1)
                if number >= NUM_WARM_UP_ROUNDS:
                    ttft_s[name].append(times.first_s - times.sent_s)
                if name == SECOND:
                    cached.add(times.cached_tokens)
                elif times.cached_tokens:
                    raise InternalError(f"{times.cached_tokens} tokens of a new prompt were found in the prefix cache")
    if len(cached) != 1:
        raise InternalError(f"the prefix was found to different lengths: {sorted(cached)}", field="cached_tokens")
    return ttft_s, cached.pop()


if __name__ == "__main__":
    report.run(main)

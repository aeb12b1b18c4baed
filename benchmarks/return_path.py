"""What comes back from the last stage for each token, in bytes, under several ways of sampling.

Two stages as processes of their own; the router counts the results' bytes as it reads them. Each way answers the same
questions, up to the end of its answer. Beside it: how often the candidates did not determine the token, so that its
position was computed once more, and what a whole row of logits would have taken.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import plots, report
from stagecoach_client import AsyncClient
from stagecoach_client.activity import activity
from stagecoach_local import LocalCluster

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k 40": {"temperature": 1.0, "top_k": 40},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
}
QUESTIONS = (
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "Give me a recipe for a vegetable soup.",
    "What should I see in Lisbon in two days?",
    "Describe the water cycle to a child.",
    "Write a poem about the first snow.",
    "Why do leaves change their colour in autumn?",
    "How do I learn to play the guitar?",
)


@dataclass(frozen=True, slots=True)
class Returned:
    """What one way of sampling took in one round."""

    tokens: int
    payload_bytes_per_token: float
    message_bytes_per_token: float
    repeats_per_token: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.argument_parser(__doc__, rounds=2, model=True)
    parser.add_argument("--output-tokens", type=int, default=96, help="of each answer at most (default 96)")
    arguments = report.parse(parser, argv)
    with LocalCluster(arguments.model, 2, threads_per_shard=1) as cluster:
        row_bytes, returned = asyncio.run(measure(cluster.address, arguments.rounds, arguments.output_tokens))
    _print(row_bytes, returned)
    settings = {"model": str(arguments.model), "requests": len(QUESTIONS), "output_tokens": arguments.output_tokens}
    results = {
        "whole_row_bytes": row_bytes,
        "ways": {
            name: {field: report.summarize([getattr(one, field) for one in rounds]) for field in Returned.__slots__}
            for name, rounds in returned.items()
        },
    }
    report.write(arguments, "return_path", settings=settings, results=results)
    _plot(arguments, row_bytes, returned)


async def measure(target: str, rounds: int, output_tokens: int) -> tuple[int, dict[str, list[Returned]]]:
    """The bytes of a whole row of bfloat16 logits, and what each way took in each round."""
    returned: dict[str, list[Returned]] = {name: [] for name in WAYS}
    async with AsyncClient(target) as client:
        (model,) = await client.models()
        for index in range(rounds):
            for name, sampling in WAYS.items():
                returned[name].append(await _run(client, sampling, index, output_tokens))
    return 2 * model.vocab_size, returned


async def _run(client: AsyncClient, sampling: dict[str, Any], seed: int, output_tokens: int) -> Returned:
    before = await client.status()
    await asyncio.gather(
        *(
            client.generate(
                messages=[{"role": "user", "content": question}],
                max_tokens=output_tokens,
                seed=seed,
                **sampling,
            )
            for question in QUESTIONS
        )
    )
    after = await client.status()
    done = activity(after, before)
    tokens = after.completion_tokens - before.completion_tokens
    assert done.result_payload_bytes_per_token is not None, "tokens were generated"
    assert done.result_bytes_per_token is not None, "tokens were generated"
    return Returned(tokens, done.result_payload_bytes_per_token, done.result_bytes_per_token, done.num_repeats / tokens)


def _print(row_bytes: int, returned: dict[str, list[Returned]]) -> None:
    rows = []
    for name, rounds in returned.items():
        payload, message, repeats = (
            statistics.median([getattr(one, field) for one in rounds])
            for field in ("payload_bytes_per_token", "message_bytes_per_token", "repeats_per_token")
        )
        rows.append((name, payload, message, f"{repeats:.2%}", f"{row_bytes / message:,.0f}x"))
    print(f"a whole row: {row_bytes:,} bytes in bfloat16, {2 * row_bytes:,} in float32")
    report.print_table(("sampling", "payload B/token", "message B/token", "repeats", "smaller than a row"), rows)


def _plot(arguments: argparse.Namespace, row_bytes: int, returned: dict[str, list[Returned]]) -> None:
    if not arguments.plot:
        return
    plots.grouped_bars(
        arguments.plot,
        title="Bytes from the last stage to the router, per token",
        groups=list(returned),
        series={
            "whole messages": [
                statistics.median([one.message_bytes_per_token for one in rounds]) for rounds in returned.values()
            ],
            "a whole row": [float(row_bytes)] * len(returned),
        },
        y_label="bytes per token",
        log_y=True,
    )


if __name__ == "__main__":
    report.run(main)

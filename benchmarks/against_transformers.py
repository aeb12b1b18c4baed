"""Two shards of one thread each against transformers' `generate` with two threads, in turn, on the same work.

Both sides compute in bfloat16 on the CPU; a request is 128 random prompt tokens and 64 new ones, greedy, with
end-of-sequence ignored. Generated tokens / wall time, prefill included. Ours is called over gRPC, through the SDK.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from stagecoach_client import AsyncClient
from stagecoach_client.load import Load, run_load
from stagecoach_client.local_cluster import LocalCluster

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides, one after the other")
    parser.add_argument("--stages", default="2", help="a number, or layer ranges")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--as-reference", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_reference:
        serve_reference(arguments.model)
        return
    concurrencies = [int(part) for part in arguments.concurrency.split(",")]
    pairs: dict[int, list[tuple[float, float]]] = {concurrency: [] for concurrency in concurrencies}
    with (
        LocalCluster(arguments.model, arguments.stages, threads_per_shard=1) as cluster,
        Reference(arguments.model) as reference,
    ):
        for concurrency in concurrencies:  # warm up, both
            asyncio.run(ours(cluster.address, concurrency))
            reference.run(concurrency)
        for _ in range(arguments.rounds):
            for concurrency in concurrencies:
                pair = asyncio.run(ours(cluster.address, concurrency)), reference.run(concurrency)
                print(f"concurrency {concurrency}: {pair[0]:.1f} and {pair[1]:.1f} tok/s", flush=True)
                pairs[concurrency].append(pair)
    rows = [summarize(concurrency, runs) for concurrency, runs in pairs.items()]
    print(f"\n{'concurrency':>11} {'stagecoach':>11} {'transformers':>13} {'ratio':>6}  (medians; e2e tok/s)")
    for row in rows:
        print(
            f"{row['concurrency']:>11} {row['stagecoach']:>11.1f} {row['transformers']:>13.1f} {row['ratio']:>6.2f}"
            f"  ({row['min_ratio']:.2f} to {row['max_ratio']:.2f})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def summarize(concurrency: int, runs: list[tuple[float, float]]) -> dict[str, float]:
    ratios = [one / other for one, other in runs]
    return {
        "concurrency": concurrency,
        "stagecoach": statistics.median(one for one, _ in runs),
        "transformers": statistics.median(other for _, other in runs),
        "ratio": statistics.median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
    }


async def ours(target: str, concurrency: int) -> float:
    """e2e tok/s of one batch of simultaneous requests."""
    async with AsyncClient(target) as client:
        [model] = await client.models()
        load = Load(concurrency, PROMPT_TOKENS, OUTPUT_TOKENS)
        seed = random.randrange(2**32)  # new prompts each time: the prefix cache is not to help
        result = await run_load(client, load, model=model.name, vocab_size=model.vocab_size, seed=seed)
        return result.e2e_tokens_per_s


class Reference:
    """transformers in a process of its own, which waits for its turn."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.against_transformers", "--model", str(model), "--as-reference"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, concurrency: int) -> float:
        """e2e tok/s of one `generate` over a batch."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{concurrency}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def serve_reference(path: Path) -> None:
    """Reads a concurrency a line, answers with tok/s."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for line in sys.stdin:
        concurrency = int(line)
        token_ids = torch.randint(100, 40000, (concurrency, PROMPT_TOKENS))
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=OUTPUT_TOKENS,
                min_new_tokens=OUTPUT_TOKENS,
                do_sample=False,
            )
        print(concurrency * OUTPUT_TOKENS / (time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
    main()

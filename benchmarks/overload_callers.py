"""The callers of the overload benchmark, in a process of their own: prints what became of each request, as JSON.

Closed loop (`--concurrency N`): N callers, each sends its next request when the last one has ended. Open loop (`--rate
R`): R requests a second at random moments (Poisson), whether others have ended or not, and nobody tries twice. Requests
are ready bytes on bare gRPC: what callers cost is taken from the servers, who share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import grpc.aio
import uvloop

from stagecoach import errors
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES, channel_options
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_cli.load_figures import RequestTimes, token_gaps_s

GENERATE = "/stagecoach.v1.Inference/Generate"
# A call that has not ended so long after its deadline hangs.
HANG_S = 5.0
# The deadline of those who wait for their answer.
PATIENCE_S = 120.0
# A deadline may be reported this much before it is, by the other machine's clock or gRPC's rounding.
EARLY_S = 0.05


@dataclass
class Tally:
    """What became of all requests; times in seconds."""

    num_sent: int = 0
    num_answered: int = 0
    num_expired: int = 0  # by their own deadline
    num_refused: int = 0  # with a delay
    num_hung: int = 0
    others: dict[str, int] = field(default_factory=dict)  # none of the above, by code and text
    wall_s: float = 0.0  # in which requests were sent
    tokens_in_wall: int = 0  # of those that were answered
    cpu_s: float = 0.0  # of this process, in that time
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    refusal_s: list[float] = field(default_factory=list)  # from sending to being refused
    retry_after_s: list[float] = field(default_factory=list)


class Callers:
    """Sends requests, and keeps the tally."""

    def __init__(self, channel: grpc.aio.Channel, arguments: argparse.Namespace) -> None:
        self.tally = Tally()
        self._arguments = arguments
        self._dice = random.Random(arguments.seed)
        self._generate = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)
        self._begin_s = self._end_s = 0.0

    async def run(self) -> Tally:
        """Sends for so many seconds, and returns when all requests have ended."""
        arguments, tally = self._arguments, self.tally
        self._begin_s = time.perf_counter()
        self._end_s = self._begin_s + arguments.seconds
        cpu_s = time.process_time()
        if arguments.concurrency:
            tasks = [asyncio.create_task(self._closed()) for _ in range(arguments.concurrency)]
        else:
            tasks = await self._open()
        await asyncio.sleep(max(0.0, self._end_s - time.perf_counter()))
        tally.wall_s = time.perf_counter() - self._begin_s
        tally.cpu_s = time.process_time() - cpu_s
        await asyncio.gather(*tasks)
        return tally

    async def _closed(self) -> None:
        while time.perf_counter() < self._end_s:
            await self._call(PATIENCE_S)

    async def _open(self) -> list[asyncio.Task[None]]:
        arguments, tasks = self._arguments, []
        at_s = self._begin_s
        while (at_s := at_s + self._dice.expovariate(arguments.rate)) < self._end_s:
            await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
            is_hasty = self._dice.random() < arguments.hasty_fraction
            tasks.append(asyncio.create_task(self._call(arguments.hasty_s if is_hasty else PATIENCE_S)))
        return tasks

    def _request(self) -> bytes:
        arguments = self._arguments
        prompt = self._dice.choices(range(arguments.vocab_size), k=arguments.prompt_tokens)
        sampling = pb.SamplingParams(temperature=0.0, max_tokens=arguments.output_tokens, ignore_eos=True)
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling).SerializeToString()

    async def _call(self, timeout_s: float) -> None:
        tally, request = self.tally, self._request()
        tally.num_sent += 1
        times = RequestTimes(time.perf_counter())
        try:
            async with asyncio.timeout(timeout_s + HANG_S):
                async for response in self._generate(request, timeout=timeout_s):
                    times.arrivals.append((time.perf_counter(), len(response.token_ids)))
        except TimeoutError:
            tally.num_hung += 1
        except grpc.aio.AioRpcError as error:
            self._take_error(error, time.perf_counter() - times.sent_s, timeout_s)
        else:
            self._take_answer(times)

    def _take_answer(self, times: RequestTimes) -> None:
        tally = self.tally
        if times.num_tokens != self._arguments.output_tokens:
            self._count_other(f"OK: {times.num_tokens} tokens instead of {self._arguments.output_tokens}")
            return
        tally.num_answered += 1
        tally.tokens_in_wall += sum(count for time_s, count in times.arrivals if time_s <= self._end_s)
        tally.ttft_s.append(times.first_s - times.sent_s)
        tally.itl_s += token_gaps_s([times])

    def _take_error(self, error: grpc.aio.AioRpcError, took_s: float, timeout_s: float) -> None:
        tally, retry_after_s = self.tally, errors.from_rpc_error(error, "router").retry_after_s
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after_s > 0:
            tally.num_refused += 1
            tally.refusal_s.append(took_s)
            tally.retry_after_s.append(retry_after_s)
        elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and took_s >= timeout_s - EARLY_S:
            tally.num_expired += 1
        else:
            self._count_other(f"{error.code().name}: {error.details()}")

    def _count_other(self, what: str) -> None:
        self.tally.others[what] = self.tally.others.get(what, 0) + 1


async def call(arguments: argparse.Namespace) -> Tally:
    """All callers share a connection, which is made before the first request."""
    options = channel_options(MAX_PUBLIC_MESSAGE_BYTES)
    async with grpc.aio.insecure_channel(arguments.target, options=options) as channel:
        await channel.channel_ready()
        return await Callers(channel, arguments).run()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--concurrency", type=int, default=0)
    loop.add_argument("--rate", type=float, default=0.0, help="requests a second")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--hasty-fraction", type=float, default=0.0, help="of those with a short deadline")
    parser.add_argument("--hasty-s", type=float, default=1.0, help="that deadline")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(asdict(uvloop.run(call(parser.parse_args(argv))))))


if __name__ == "__main__":
    main()

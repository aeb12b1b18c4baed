"""Callers that keep streams open to a router and only count: as little as a gRPC client can do.

A process of its own, which `router_scaling` starts and asks. Each stream sends one request after the other (random
prompt tokens, end-of-sequence ignored) on a channel that it shares with others. For each line on stdin, one line of
JSON on stdout: what has come since the start, and the processor time this process took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import grpc.aio
import uvloop

from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES, channel_options
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import inference_pb2_grpc

STREAMS_PER_CHANNEL = 64
FIRST_TOKEN_ID, END_TOKEN_ID = 100, 40_000


@dataclass(slots=True)
class Counts:
    """What has come; `num_started`: streams that have their first token."""

    num_tokens: int = 0
    num_responses: int = 0
    num_started: int = 0
    num_requests: int = 0
    cpu_s: float = 0.0
    time_s: float = 0.0
    error: str = ""  # of the stream that ended first without having been asked to


async def call_for_ever(stub: Any, request: pb.GenerateRequest, counts: Counts) -> None:
    """One stream: requests, one after the other."""
    dice = random.Random()
    num_prompt_tokens = len(request.token_ids.ids)
    started = False
    while True:
        del request.token_ids.ids[:]
        request.token_ids.ids.extend(dice.randrange(FIRST_TOKEN_ID, END_TOKEN_ID) for _ in range(num_prompt_tokens))
        counts.num_requests += 1
        call = stub.Generate(request)
        while isinstance(response := await call.read(), pb.GenerateResponse):
            counts.num_tokens += len(response.token_ids)
            counts.num_responses += 1
            if not started:
                started = True
                counts.num_started += 1
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            counts.error = counts.error or f"{code.name}: {await call.details()}"
            return


async def answer(counts: Counts) -> None:
    """Tells the counts for each line on stdin; returns at its end."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        counts.cpu_s, counts.time_s = time.process_time(), time.perf_counter()
        print(json.dumps(asdict(counts)), flush=True)


async def serve(target: str, num_streams: int, num_prompt_tokens: int, sampling: pb.SamplingParams) -> None:
    counts = Counts()
    channels = [
        grpc.aio.insecure_channel(target, options=channel_options(MAX_PUBLIC_MESSAGE_BYTES))
        for _ in range(-(-num_streams // STREAMS_PER_CHANNEL))
    ]
    stubs: list[Any] = [
        inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        for channel in channels
    ]
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0] * num_prompt_tokens), sampling=sampling)
    tasks = []
    for index in range(num_streams):
        own = pb.GenerateRequest()
        own.CopyFrom(request)
        tasks.append(asyncio.create_task(call_for_ever(stubs[index % len(stubs)], own, counts)))
    await answer(counts)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for channel in channels:
        await channel.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--sampling", default="{}", help="SamplingParams as JSON")
    arguments = parser.parse_args()
    sampling = pb.SamplingParams(**json.loads(arguments.sampling))
    uvloop.run(serve(arguments.target, arguments.streams, arguments.prompt_tokens, sampling))


if __name__ == "__main__":
    main()

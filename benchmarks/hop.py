"""What one hop costs, from one process to the next, for the sizes hidden states have.

In turn: ours (framing, Forward link with credits, a tensor that looks into the received bytes, over to a compute thread
and back), ours without the thread, a grpc.aio stream of nothing but bytes, one of protobuf messages with a bytes field,
and raw TCP. Latency is half a round trip; throughput is one-way, many payloads after one another.

Ours is to cost at most 1.5 times the stream of bytes. Every frame of ours must have been read without a copy, else
this fails.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import uvloop

from benchmarks import plots, report
from benchmarks.hop_paths import TIMEOUT_S, GrpcPath, InlinePath, Path, StagecoachPath, TcpPath, check_frames
from stagecoach.errors import ConfigError
from stagecoach.process.listener import listen
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES

NAMES = ("stagecoach", "no thread", "grpc bytes", "grpc protobuf", "tcp")
OURS, INLINE, REFERENCE, PROTOBUF, TCP = NAMES
# Bytes of a payload, and how many of them a round sends each way.
COUNTS = {8 << 10: 300, 64 << 10: 200, 1 << 20: 40, 8 << 20: 8}
Measured = dict[str, list[float]]  # by way: a figure for each round


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.argument_parser(__doc__, rounds=7)
    parser.add_argument("--sizes", default=",".join(map(str, COUNTS)), help="of payloads, in bytes; multiples of 8192")
    arguments = report.parse(parser, argv)
    sizes = _sizes(arguments.sizes)
    latency_s, bytes_per_s = uvloop.run(measure(sizes, arguments.rounds))
    _print(latency_s, bytes_per_s)
    results = [
        {
            "payload_bytes": size,
            "one_way_latency_s": {name: report.summarize(latency_s[size][name]) for name in NAMES},
            "bytes_per_s": {name: report.summarize(bytes_per_s[size][name]) for name in NAMES},
            "latency_ratio": report.summarize(_ratios(latency_s[size])),
        }
        for size in sizes
    ]
    report.write(
        arguments, "hop", settings={"payloads_per_round": {size: _count(size) for size in sizes}}, results=results
    )
    if arguments.plot:
        medians = {name: [1e6 * statistics.median(latency_s[size][name]) for size in sizes] for name in NAMES}
        plots.grouped_bars(
            arguments.plot,
            title="One hop between two processes of this machine",
            groups=[_size_name(size) for size in sizes],
            series=medians,
            y_label="one way, microseconds",
            log_y=True,
        )


async def measure(sizes: Sequence[int], rounds: int) -> tuple[Mapping[int, Measured], Mapping[int, Measured]]:
    """Seconds one way, and bytes a second, by size."""
    latency_s: dict[int, Measured] = {size: {name: [] for name in NAMES} for size in sizes}
    bytes_per_s: dict[int, Measured] = {size: {name: [] for name in NAMES} for size in sizes}
    async with _all_paths() as paths:
        for size in sizes:
            count = _count(size)
            for path in paths.values():  # warm up
                await path.round_trips(size, max(2, count // 4))
            for index in range(rounds):
                turn = NAMES if index % 2 == 0 else NAMES[::-1]  # nobody always goes first
                for name in turn:
                    times = await paths[name].round_trips(size, count)
                    latency_s[size][name].append(statistics.median(times) / 2)
                for name in turn:
                    bytes_per_s[size][name].append(size * count / await paths[name].one_way(size, count))
    return latency_s, bytes_per_s


@asynccontextmanager
async def _all_paths() -> AsyncIterator[dict[str, Path]]:
    server, port = listen(MAX_SHARD_MESSAGE_BYTES, "127.0.0.1:0")
    ours = StagecoachPath(server)
    await server.start()
    command = [sys.executable, "-m", "benchmarks.hop_echo", f"127.0.0.1:{port}"]
    other = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    paths: dict[str, Path] = {}
    try:
        line = await asyncio.wait_for(other.stdout.readline(), TIMEOUT_S)
        tcp_port, plain_port, our_port = map(int, line.split())
        await ours.connect(our_port)
        paths[OURS] = ours
        paths[INLINE] = InlinePath(ours)
        paths[REFERENCE] = GrpcPath(plain_port, protobuf=False)
        paths[PROTOBUF] = GrpcPath(plain_port, protobuf=True)
        paths[TCP] = await TcpPath.connect(tcp_port)
        yield paths
        other.stdin.close()
        check_frames(*map(int, (await asyncio.wait_for(other.stdout.readline(), TIMEOUT_S)).split()))
    finally:
        for path in paths.values():
            await path.close()
        other.stdin.close()
        await asyncio.wait_for(other.wait(), TIMEOUT_S)
        await server.stop(None)


def _print(latency_s: Mapping[int, Measured], bytes_per_s: Mapping[int, Measured]) -> None:
    rows = []
    for size, measured in latency_s.items():
        ratios = _ratios(measured)
        medians = [1e6 * statistics.median(measured[name]) for name in NAMES]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append((_size_name(size), *medians, ratio))
    print("one way, us (half a round trip); medians of rounds")
    report.print_table(("payload", *NAMES, f"{OURS} / {REFERENCE}"), rows)
    print("\none-way throughput, MB/s; medians of rounds")
    throughput = [
        (_size_name(size), *(statistics.median(measured[name]) / 1e6 for name in NAMES))
        for size, measured in bytes_per_s.items()
    ]
    report.print_table(("payload", *NAMES), throughput)


def _ratios(latency_s: Measured) -> list[float]:
    return [ours / reference for ours, reference in zip(latency_s[OURS], latency_s[REFERENCE], strict=True)]


def _count(size: int) -> int:
    """How many payloads a round has: about as many as take as long as those of the sizes in the table."""
    return COUNTS.get(size) or max(8, min(300, (8 << 23) // size))


def _size_name(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"sizes: {text!r} is not a list of numbers", field="sizes", value=text) from error
    for size in sizes:
        if size < 8192 or size % 8192 or size > MAX_SHARD_MESSAGE_BYTES // 2:
            limit = f"a multiple of 8192, at most {MAX_SHARD_MESSAGE_BYTES // 2}"
            raise ConfigError(f"sizes: {size} is not {limit}", field="sizes", limit=limit, value=size)
    return sizes


if __name__ == "__main__":
    report.run(main)

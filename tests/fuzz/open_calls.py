"""An abuser of open calls, over HTTP/2 that is made by hand: it opens, stalls, resets, watches, and reads nothing.

Every frame that it sends is one that HTTP/2 allows, apart from some that are nothing at all; what is wrong is only what
they come to together. So no decoder refuses it, and only shares keep it out of the others' way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import sys
from collections.abc import Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE, CANCEL = 4, 8

METHODS = (
    "/stagecoach.v1.Inference/Generate",
    "/stagecoach.v1.Inference/Tokenize",
    "/stagecoach.v1.Inference/ListModels",
    "/stagecoach.v1.Inference/GetClusterStatus",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.health.v1.Health/List",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/no.such.Service/Method",
)
# Connections at a time; acts before one is closed and another opened; how often in a row an act is done, at most.
MAX_CONNECTIONS = 6
MAX_ACTS = 40
MAX_REPEATS = 300
# Calls it opens in a second, on the average. A router looks at some 3,000. More in the long run is a flood, in which
# gRPC cancels calls where 4,096 wait unseen, whosever they are (docs/security.md).
MAX_OPENS_PER_S = 1000


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that no table holds; of up to 126 bytes each."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def headers(method: str) -> bytes:
    """The header block of a gRPC call: POST and http are in HPACK's own table."""
    fields = {b":path": method.encode(), b":authority": b"x", b"content-type": b"application/grpc", b"te": b"trailers"}
    return b"\x83\x86" + b"".join(_literal(name, value) for name, value in fields.items())


class _Connection:
    """One connection of the abuser."""

    def __init__(self, rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._rng = rng
        self._writer = writer
        self._next_stream = 1
        takes_nothing = rng.random() < 0.3
        writer.write(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0) * takes_nothing))
        self._reading = None if rng.random() < 0.2 else asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Says yes to settings and pings, or the server would hang up."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                if head[3] in (SETTINGS, PING) and not head[4] & ACK:
                    self._writer.write(frame(head[3], ACK, 0, payload if head[3] == PING else b""))

    async def act(self) -> int:
        """Does something, often many times in a row. Returns how many calls that opened.

        Raises OSError where the server has hung up.
        """
        first_stream = self._next_stream
        acts: list[Callable[[], None]] = [
            self._open,
            self._open_and_send_part,
            self._open_and_send_all,
            self._open_and_reset,
            self._reset_any,
            self._ping,
            self._take_a_little,
        ]
        do = self._rng.choice(acts)
        for _ in range(self._rng.randint(1, MAX_REPEATS)):
            if self._writer.transport.is_closing():  # what is written to it goes nowhere
                raise ConnectionAbortedError
            do()
        if self._rng.random() < 0.02:
            self._writer.write(self._rng.randbytes(64))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await self._writer.drain()
        return (self._next_stream - first_stream) // 2

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._writer.transport.abort()

    def _open(self, flags: int = END_HEADERS) -> int:
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._writer.write(frame(HEADERS, flags, stream, headers(self._rng.choice(METHODS))))
        return stream

    def _open_and_send_part(self) -> None:
        message = struct.pack(">BI", 0, self._rng.choice((5, 1 << 12, 4 << 20))) + self._rng.randbytes(4)
        self._writer.write(frame(DATA, 0, self._open(), message))

    def _open_and_send_all(self) -> None:
        self._writer.write(frame(DATA, END_STREAM, self._open(), struct.pack(">BI", 0, 0)))

    def _open_and_reset(self) -> None:
        self._writer.write(frame(RST_STREAM, 0, self._open(), struct.pack(">I", CANCEL)))

    def _reset_any(self) -> None:
        stream = self._rng.randrange(1, self._next_stream + 1) | 1
        if stream < self._next_stream:
            self._writer.write(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))

    def _ping(self) -> None:
        if self._rng.random() < 0.05:  # more are an attack that gRPC itself ends
            self._writer.write(frame(PING, 0, 0, bytes(8)))

    def _take_a_little(self) -> None:
        self._writer.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)))


async def abuse(port: int, seed: int) -> None:
    """Abuses the server on a port of this machine until cancelled. Says so on stdout when it has begun."""
    rng, num_acts_done = random.Random(seed), 0
    connections: list[tuple[_Connection, int]] = []
    try:
        while True:
            if len(connections) < MAX_CONNECTIONS:
                with contextlib.suppress(OSError):
                    streams = await asyncio.open_connection("127.0.0.1", port)
                    connections.append((_Connection(rng, *streams), rng.randint(1, MAX_ACTS)))
            connection, num_acts = connections.pop(rng.randrange(len(connections)))
            try:
                num_opened = await connection.act()
                if num_acts_done == 0:
                    print("abusing", flush=True)
                num_acts_done += 1
                if num_acts == 0:
                    raise ConnectionAbortedError
                connections.append((connection, num_acts - 1))
                await asyncio.sleep(num_opened / MAX_OPENS_PER_S)
            except OSError:
                connection.close()
    finally:
        for connection, _ in connections:
            connection.close()


if __name__ == "__main__":
    asyncio.run(abuse(int(sys.argv[1]), int(sys.argv[2])))

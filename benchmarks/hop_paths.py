"""The ways in which bytes cross from one process to another: ours, and the three it is compared with; the asking end.

Each has a round trip (a payload goes out and comes back) and a one-way run (many payloads go out, a few bytes come back
after the last one), one connection, uvloop on both ends, and no compression. `hop_echo` is the answering end.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc.aio
import torch
from torch import Tensor

from benchmarks.hop_endpoint import BYTES_PER_TOKEN, ECHO, HIDDEN_SIZE, INLINE, SINK, Endpoint, micro_batch_header
from stagecoach.errors import InternalError, StagecoachError
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES
from stagecoach.rpc.forward_link import ForwardLink
from stagecoach.v1 import shard_pb2
from stagecoach_shard.leases import wire

PLAIN_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_SHARD_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_SHARD_MESSAGE_BYTES),
]
RAW_METHOD, PROTOBUF_METHOD = "/hop/Raw", "/hop/Protobuf"
# Metadata of a call: how many payloads go out before an answer; 0: each comes back.
COUNT_KEY = "hop-count"
# What goes before a run over TCP: a payload's bytes, how many payloads, and whether each comes back.
TCP_HEAD = struct.Struct("!QQ?")
TIMEOUT_S = 60.0


class Path(Protocol):
    """One way across."""

    async def round_trips(self, num_bytes: int, count: int) -> list[float]:
        """Seconds of each of `count` round trips, one after the other."""

    async def one_way(self, num_bytes: int, count: int) -> float:
        """Seconds from the first of `count` payloads to the answer to the last one."""

    async def close(self) -> None: ...


class TcpPath:
    """Nothing but the bytes: the least that a protocol over TCP can cost."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    async def connect(cls, port: int) -> TcpPath:
        connection = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port))
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(connection)

    async def round_trips(self, num_bytes: int, count: int) -> list[float]:
        loop = asyncio.get_running_loop()
        payload, received = bytes(num_bytes), bytearray(num_bytes)
        await loop.sock_sendall(self._socket, TCP_HEAD.pack(num_bytes, count, True))
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            await loop.sock_sendall(self._socket, payload)
            await receive_exactly(self._socket, received)
            times.append(time.perf_counter() - begin)
        return times

    async def one_way(self, num_bytes: int, count: int) -> float:
        loop = asyncio.get_running_loop()
        payload = bytes(num_bytes)
        await loop.sock_sendall(self._socket, TCP_HEAD.pack(num_bytes, count, False))
        begin = time.perf_counter()
        for _ in range(count):
            await loop.sock_sendall(self._socket, payload)
        await receive_exactly(self._socket, bytearray(1))
        return time.perf_counter() - begin

    async def close(self) -> None:
        self._socket.close()


class GrpcPath:
    """A bidirectional stream of grpc.aio; `protobuf`: the bytes are a field of a message, else they are the message."""

    def __init__(self, port: int, *, protobuf: bool) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=PLAIN_OPTIONS)
        self._call: Callable[..., grpc.aio.StreamStreamCall[Any, Any]]
        self._wrap: Callable[[bytes], object]
        if protobuf:
            self._call = self._channel.stream_stream(
                PROTOBUF_METHOD,
                request_serializer=shard_pb2.FileChunk.SerializeToString,
                response_deserializer=shard_pb2.FileChunk.FromString,
            )
            self._wrap = lambda payload: shard_pb2.FileChunk(data=payload)
        else:
            self._call = self._channel.stream_stream(RAW_METHOD)
            self._wrap = lambda payload: payload

    async def round_trips(self, num_bytes: int, count: int) -> list[float]:
        payload = bytes(num_bytes)
        call = self._call(metadata=((COUNT_KEY, "0"),))
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            await call.write(self._wrap(payload))
            await call.read()
            times.append(time.perf_counter() - begin)
        await call.done_writing()
        return times

    async def one_way(self, num_bytes: int, count: int) -> float:
        payload = bytes(num_bytes)
        call = self._call(metadata=((COUNT_KEY, str(count)),))
        begin = time.perf_counter()
        for _ in range(count):
            await call.write(self._wrap(payload))
        await call.read()
        elapsed_s = time.perf_counter() - begin
        await call.done_writing()
        return elapsed_s

    async def close(self) -> None:
        await self._channel.close()


class StagecoachPath:
    """Ours, from a tensor in this process to a tensor in the other, through both compute threads, and back.

    `flags`: INLINE leaves the threads out, which shows what they cost.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.endpoint = Endpoint(self._on_computed)
        self.endpoint.start(server)
        self._link: ForwardLink | None = None
        self._answer: asyncio.Future[None] | None = None

    async def connect(self, port: int) -> None:
        self._link = ForwardLink(f"127.0.0.1:{port}", on_failure=self._on_failure)
        await self._link.open(TIMEOUT_S)

    async def round_trips(self, num_bytes: int, count: int, flags: int = 0) -> list[float]:
        hidden_states = _hidden_states(num_bytes)
        times = []
        for step in range(1, count + 1):
            header = micro_batch_header(len(hidden_states), lease_id=ECHO | flags, step=step)
            begin = time.perf_counter()
            answer = self._expect_answer()
            self._send(header, hidden_states)
            await answer
            times.append(time.perf_counter() - begin)
        check_frames(self.endpoint.frames.num_frames, self.endpoint.frames.num_fast_frames)
        return times

    async def one_way(self, num_bytes: int, count: int, flags: int = 0) -> float:
        hidden_states = _hidden_states(num_bytes)
        window = asyncio.Semaphore(2)  # written frames that wait for the link, as many as a stage has at hand
        begin = time.perf_counter()
        answer = self._expect_answer()
        for step in range(1, count + 1):
            await window.acquire()
            header = micro_batch_header(len(hidden_states), lease_id=SINK | flags, step=step, num_steps=count)
            self._send(header, hidden_states, window.release)
        await answer
        elapsed_s = time.perf_counter() - begin
        check_frames(self.endpoint.frames.num_frames, self.endpoint.frames.num_fast_frames)
        return elapsed_s

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()

    def _expect_answer(self) -> asyncio.Future[None]:
        self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    def _send(
        self, header: shard_pb2.MicroBatchHeader, hidden_states: Tensor, on_sent: Callable[[], None] | None = None
    ) -> None:
        assert self._link is not None, "connect comes first"
        self._link.send(wire.write_hidden_states(header, hidden_states), on_sent)

    def _on_computed(self, _: shard_pb2.MicroBatchHeader, __: Tensor, give_credit_back: Callable[[], None]) -> None:
        give_credit_back()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)

    def _on_failure(self, error: StagecoachError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


class InlinePath:
    """Ours without the compute threads: framing, link and credits."""

    def __init__(self, ours: StagecoachPath) -> None:
        self._ours = ours

    async def round_trips(self, num_bytes: int, count: int) -> list[float]:
        return await self._ours.round_trips(num_bytes, count, INLINE)

    async def one_way(self, num_bytes: int, count: int) -> float:
        return await self._ours.one_way(num_bytes, count, INLINE)

    async def close(self) -> None:
        """The connection is the other one's."""


def check_frames(num_frames: int, num_fast_frames: int) -> None:
    """Figures of a path that silently fell back to copying would be figures of something else."""
    if num_fast_frames != num_frames or num_frames == 0:
        text = f"only {num_fast_frames} of {num_frames} frames were read without a copy"
        raise InternalError(text, field="num_fast_frames", limit=num_frames, value=num_fast_frames)


async def receive_exactly(connection: socket.socket, buffer: bytearray) -> bool:
    """Fills the buffer; False where the other end has closed."""
    loop = asyncio.get_running_loop()
    view = memoryview(buffer)
    while view:
        num_bytes = await loop.sock_recv_into(connection, view)
        if num_bytes == 0:
            return False
        view = view[num_bytes:]
    return True


def _hidden_states(num_bytes: int) -> Tensor:
    assert num_bytes % BYTES_PER_TOKEN == 0
    return torch.zeros(num_bytes // BYTES_PER_TOKEN, HIDDEN_SIZE, dtype=torch.bfloat16)

"""The answering end of a hop, in a process of its own: `hop` starts it.

Prints one line, "<TCP port> <port of plain gRPC> <port of ours>", and serves until its standard input ends. Then it
prints how many frames of ours it read, and how many of them without a copy.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import grpc
import grpc.aio
import uvloop

from benchmarks.hop_endpoint import Answerer, Context
from benchmarks.hop_paths import (
    COUNT_KEY,
    PLAIN_OPTIONS,
    PROTOBUF_METHOD,
    RAW_METHOD,
    TCP_HEAD,
    TIMEOUT_S,
    receive_exactly,
)
from stagecoach.process.listener import listen
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES
from stagecoach.v1 import shard_pb2


async def serve(peer: str) -> None:
    """`peer`: HOST:PORT of the asking end, where our own path's frames go back to."""
    plain = grpc.aio.server(options=PLAIN_OPTIONS)
    plain.add_generic_rpc_handlers((_echo_handlers(),))
    plain_port = plain.add_insecure_port("127.0.0.1:0")
    server, port = listen(MAX_SHARD_MESSAGE_BYTES, "127.0.0.1:0")
    answerer = Answerer()
    answerer.endpoint.start(server)
    await plain.start()
    await server.start()
    await answerer.connect(peer, TIMEOUT_S)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    echo = asyncio.create_task(_serve_tcp(listener))
    print(listener.getsockname()[1], plain_port, port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    echo.cancel()
    frames = answerer.endpoint.frames
    print(frames.num_frames, frames.num_fast_frames, flush=True)
    await answerer.close()
    await plain.stop(None)
    await server.stop(None)


def _echo_handlers() -> grpc.GenericRpcHandler:
    class Handlers(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            if handler_call_details.method == RAW_METHOD:
                return grpc.stream_stream_rpc_method_handler(_echo_bytes)
            if handler_call_details.method == PROTOBUF_METHOD:
                return grpc.stream_stream_rpc_method_handler(
                    _echo_messages,
                    request_deserializer=shard_pb2.FileChunk.FromString,
                    response_serializer=shard_pb2.FileChunk.SerializeToString,
                )
            return None

    return Handlers()


async def _echo_bytes(_: object, context: Context) -> None:
    count = _count(context)
    received = 0
    while isinstance(payload := await context.read(), bytes):
        received += 1
        if count == 0:
            await context.write(payload)
        elif received == count:
            await context.write(b"")


async def _echo_messages(_: object, context: Context) -> None:
    count = _count(context)
    received = 0
    while isinstance(message := await context.read(), shard_pb2.FileChunk):
        received += 1
        if count == 0:
            # A stage's own output is new bytes, so a message that came in is never what goes out.
            await context.write(shard_pb2.FileChunk(data=message.data))
        elif received == count:
            await context.write(shard_pb2.FileChunk())


def _count(context: Context) -> int:
    return int(dict(context.invocation_metadata() or ())[COUNT_KEY])


async def _serve_tcp(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    connection, _ = await loop.sock_accept(listener)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = bytearray(TCP_HEAD.size)
    while await receive_exactly(connection, head):
        num_bytes, count, echo = TCP_HEAD.unpack(head)
        payload = bytearray(num_bytes)
        for _ in range(count):
            await receive_exactly(connection, payload)
            if echo:
                await loop.sock_sendall(connection, payload)
        if not echo:
            await loop.sock_sendall(connection, b"\x01")


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))

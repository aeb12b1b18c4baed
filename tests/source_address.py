"""Calls that come, as a server sees it, from another host: on Linux, loopback is all of 127.0.0.0/8."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio


@asynccontextmanager
async def coming_from(host: str, port: int) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the server on `port` whose connection has the source address `host`."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
        try:
            await asyncio.wait(
                [asyncio.ensure_future(pass_on(*ends)) for ends in ((reader, far_writer), (far_reader, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for each in (writer, far_writer):
                each.close()

    listening = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with listening:
        near_port = listening.sockets[0].getsockname()[1]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{near_port}") as channel:
            yield channel

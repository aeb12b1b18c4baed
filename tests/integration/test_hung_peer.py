"""A peer whose process is stopped, behind a connection that stands, is found out in the time that channel.py says."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import grpc
import grpc.aio
import pytest

from stagecoach.rpc import channel

# Answers once, and then computes for as long as anyone waits.
SERVER = """
import concurrent.futures, threading, grpc
class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        def answer(request, context):
            yield b"first"
            threading.Event().wait()
        return grpc.unary_stream_rpc_method_handler(answer)
server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
server.add_generic_rpc_handlers((Handler(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
server.wait_for_termination()
"""


async def test_a_stopped_server_is_found_out_by_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "KEEPALIVE_INTERVAL_S", 0.5)
    monkeypatch.setattr(channel, "KEEPALIVE_TIMEOUT_S", 0.5)
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE)
    assert server.stdout is not None
    try:
        port = int(await server.stdout.readline())
        options = channel.channel_options(1024)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as connection:
            call = connection.unary_stream("/any/method")(b"")
            assert await call.read() == b"first"
            os.kill(server.pid, signal.SIGSTOP)
            async with asyncio.timeout(30):  # gRPC's own timeout of a ping is 60 s
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        server.kill()
        await server.wait()

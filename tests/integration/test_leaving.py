"""A program that leaves without closing its stream ends its request, though that would linger; a killed one cannot.

Real programs, against a scripted router.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from stagecoach.v1 import inference_pb2 as pb
from tests.integration.fake_router import FakeRouter, counting, serving

BEGINNING = """
import asyncio, gc, os, signal, sys, threading, time
from stagecoach_client import AsyncClient, Client

client = Client(sys.argv[1])
OPTIONS = dict(stream=True, linger_s=60.0, request_id="mine", max_tokens=5)
"""
LEAVING = {
    "ends": "stream = client.generate('x', **OPTIONS); next(stream)",
    "fails": "stream = client.generate('x', **OPTIONS); next(stream); 1 / 0",
    "is interrupted": """
for chunk in client.generate('x', **OPTIONS):
    threading.Timer(0.01, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
""",
    "leaves a thread that reads": """
begun = threading.Event()
def read():
    for chunk in client.generate('x', **OPTIONS):
        begun.set()
threading.Thread(target=read, daemon=True).start()
begun.wait()
""",
    "ends its event loop": """
async def main():
    global stream, async_client
    async_client = AsyncClient(sys.argv[1])
    stream = await async_client.generate('x', **OPTIONS)
    await anext(stream)
asyncio.run(main())
""",
    "ends its event loop with a task in it": """
async def read(begun):
    async for chunk in await AsyncClient(sys.argv[1]).generate('x', **OPTIONS):
        begun.set()
async def main():
    begun = asyncio.Event()
    task = asyncio.create_task(read(begun))
    await begun.wait()
asyncio.run(main())
""",
}


def leave(code: str, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGINNING + code, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("how", LEAVING)
def test_a_program_that_leaves_ends_its_request(how: str) -> None:
    router = FakeRouter(counting, stay_open=True)
    with serving(router) as address:
        left = leave(LEAVING[how], address)
    assert set(router.cancelled) == {"mine"}, left.stderr
    assert (left.returncode == 0) == (how not in ("fails", "is interrupted")), left.stderr
    assert left.returncode == 0 or "stagecoach_client/farewell.py" not in left.stderr


def test_a_stream_that_is_dropped_ends_its_request_while_the_program_goes_on() -> None:
    router = FakeRouter(counting, stay_open=True)
    code = """
def begin_and_drop():
    next(Client(sys.argv[1]).generate('x', **OPTIONS))
begin_and_drop()
gc.collect()
sys.stdin.read()
os._exit(0)
"""
    with serving(router) as address:
        command = [sys.executable, "-c", BEGINNING + code, address]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as program:
            assert router.caller_left.wait(20)
            assert router.told.wait(20)
            program.communicate()
    assert router.cancelled == ["mine"]


def test_a_program_that_is_killed_leaves_its_request_to_linger() -> None:
    router = FakeRouter(counting, stay_open=True)
    with serving(router) as address:
        leave("stream = client.generate('x', **OPTIONS); next(stream); os.kill(os.getpid(), signal.SIGKILL)", address)
        assert router.caller_left.wait(20)
    assert router.cancelled == []


@pytest.mark.parametrize("how", ["", "stream.close()"])
def test_a_child_process_does_not_end_its_parents_request(how: str) -> None:
    """Neither where it just ends, nor where it unwinds."""
    router = FakeRouter(counting, stay_open=True)
    code = f"""
from stagecoach_client import farewell
stream = client.generate('x', **OPTIONS); next(stream)
[words] = farewell._open
words._pid -= 1  # as a forked child sees it, where gRPC itself could not be used
{how}
"""
    with serving(router) as address:
        assert leave(code, address).returncode == 0
        assert router.caller_left.wait(20)
    assert router.cancelled == []


class HungRouter(FakeRouter):
    """Has nothing to say about a request that is to end."""

    def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        context.add_callback(self.caller_left.set)
        self.caller_left.wait(20)
        return pb.CancelResponse()


def test_a_router_that_does_not_answer_delays_the_end_of_a_program_by_a_second() -> None:
    router = HungRouter(counting)
    first = """
import atexit, time
atexit.register(lambda: print(time.monotonic() - left))  # the last one that is called
"""
    then = """
streams = [client.generate('x', **(OPTIONS | {"request_id": str(number)})) for number in range(3)]
for stream in streams:
    next(stream)
left = time.monotonic()
"""
    with serving(router) as address:
        command = [sys.executable, "-c", first + BEGINNING + then, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert 0.9 < float(done.stdout) < 10.0

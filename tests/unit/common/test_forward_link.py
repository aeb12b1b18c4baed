"""The sending side of a Forward stream: what it takes for credits, and how it ends. The stream is a fake."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc.aio
import pytest

from stagecoach import errors
from stagecoach.rpc import forward_link
from stagecoach.rpc.credits import MAX_CREDITS
from stagecoach.rpc.forward_link import ForwardLink
from stagecoach.v1.shard_pb2 import ForwardResponse

ADDRESS = "shard.example:1"


class Stream:
    """A call to which the test's `answers` come back, and which ends after None."""

    def __init__(self) -> None:
        self.answers = asyncio.Queue()
        self.written = []

    async def write(self, frame):
        self.written.append(frame)

    async def read(self):
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return grpc.aio.EOF if answer is None else ForwardResponse(credits=answer)

    async def code(self):
        return grpc.StatusCode.OK


@pytest.fixture
async def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(forward_link, "ShardStub", lambda channel: SimpleNamespace(forward=lambda: stream))
    return stream


def closable():
    async def close():
        pass

    return SimpleNamespace(close=close)


async def opened(stream, credits=4):
    failed = asyncio.get_running_loop().create_future()
    link = ForwardLink(ADDRESS, on_failure=failed.set_result, dial=lambda address: closable())
    stream.answers.put_nowait(credits)
    await link.open(5.0)
    return link, failed


async def send(link, stream, count):
    for _ in range(count):
        sent = asyncio.get_running_loop().create_future()
        link.send(b"frame", lambda sent=sent: sent.set_result(None))
        await asyncio.wait_for(sent, 5.0)


async def test_as_many_frames_leave_as_there_are_credits_and_more_when_they_come_back(stream):
    link, failed = await opened(stream, credits=2)
    await send(link, stream, 2)
    stream.answers.put_nowait(2)
    await send(link, stream, 2)
    assert not failed.done()
    await link.close()


@pytest.mark.parametrize(("num_sent", "credits"), [(0, 1), (2, 3), (2, 2**32 - 1), (2, 0)])
async def test_credits_that_nobody_is_owed_are_a_fault_of_the_one_who_sent_them(stream, num_sent, credits):
    link, failed = await opened(stream)
    await send(link, stream, num_sent)
    stream.answers.put_nowait(credits)
    error = await asyncio.wait_for(failed, 5.0)
    assert isinstance(error, errors.ShardFault)
    assert (error.field, error.limit, error.value) == ("credits", str(num_sent), str(credits))
    assert error.addresses == (ADDRESS,)
    await link.close()


@pytest.mark.parametrize("credits", [0, MAX_CREDITS + 1, 2**32 - 1])
async def test_a_window_that_cannot_be_is_refused(stream, credits):
    with pytest.raises(errors.ShardFault) as caught:
        await opened(stream, credits)
    assert (caught.value.field, caught.value.addresses) == ("credits", (ADDRESS,))


@pytest.mark.parametrize("where", ["write", "on_sent"])
async def test_an_error_that_nobody_foresaw_in_sending_is_told_once(stream, monkeypatch, where):
    """Without that, frames would wait in line for ever, and nobody would know."""
    link, failed = await opened(stream)

    async def write(frame):
        raise ZeroDivisionError("a bug")

    if where == "write":
        monkeypatch.setattr(stream, "write", write)
        link.send(b"frame")
    else:
        link.send(b"frame", lambda: 1 // 0)
    error = await asyncio.wait_for(failed, 5.0)
    assert isinstance(error, errors.InternalError)
    assert error.addresses == (ADDRESS,)
    stream.answers.put_nowait(None)  # a second result of the future would be an error
    await asyncio.wait_for(link._tasks[0], 5.0)
    await link.close()


async def test_an_error_that_nobody_foresaw_ends_the_link_and_is_told(stream):
    link, failed = await opened(stream)
    stream.answers.put_nowait(ZeroDivisionError("a bug"))
    error = await asyncio.wait_for(failed, 5.0)
    assert isinstance(error, errors.InternalError)
    assert error.addresses == (ADDRESS,)
    await link.close()

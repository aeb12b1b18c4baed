"""The limits in front of a service: how many calls they let in, and what senders of requests can make it hold."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import grpc.aio
import pytest

from stagecoach import errors
from stagecoach_router.frontend.auth_interceptor import HEALTH_CHECK
from stagecoach_router.frontend.call_limits import MAX_READING, MAX_READING_PER_HOST, CallLimits

TIMEOUT_S = 20.0
STREAM, ONCE = "/test.Echo/Stream", "/test.Echo/Once"


class Message:
    """A request; unlike bytes, it can be seen to be gone."""

    def __init__(self, data: bytes) -> None:
        self.data = data


class Echo(grpc.GenericRpcHandler):
    """Answers once it may; the request is not needed for that."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.requests: list[weakref.ref[Message]] = []
        self.num_received = 0
        self.port = 0

    def service(self, details: grpc.HandlerCallDetails):
        if details.method == STREAM:
            return grpc.unary_stream_rpc_method_handler(self.stream, request_deserializer=self.receive)
        if details.method in (ONCE, HEALTH_CHECK):
            return grpc.unary_unary_rpc_method_handler(self.once, request_deserializer=self.receive)
        return None

    def receive(self, data: bytes) -> Message:
        self.num_received += 1
        message = Message(data)
        self.requests.append(weakref.ref(message))
        return message

    async def stream(self, request: Message, context: grpc.aio.ServicerContext) -> None:
        answer = request.data
        del request
        await self.may_answer.wait()
        for _ in range(2):
            await context.write(answer)

    async def once(self, request: Message, context: grpc.aio.ServicerContext) -> bytes:
        return request.data


@asynccontextmanager
async def serving(limits: CallLimits) -> AsyncIterator[tuple[Echo, grpc.aio.Channel]]:
    echo = Echo()
    server = grpc.aio.server(interceptors=[limits])
    server.add_generic_rpc_handlers((echo,))
    echo.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(TIMEOUT_S), grpc.aio.insecure_channel(f"127.0.0.1:{echo.port}") as channel:
        yield echo, channel
    await server.stop(None)


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


async def until(holds) -> None:
    while not holds():
        await asyncio.sleep(0.005)


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def test_what_is_let_in_is_answered_as_without_limits() -> None:
    async with serving(CallLimits(1)) as (echo, channel):
        echo.may_answer.set()
        assert await channel.unary_unary(ONCE)(b"a") == b"a"
        assert [answer async for answer in channel.unary_stream(STREAM)(b"b")] == [b"b", b"b"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test.Echo/Other")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_beyond_the_limit_a_call_is_told_when_to_come_back_and_its_request_is_not_received() -> None:
    async with serving(limits := CallLimits(1, lambda: 7.0)) as (echo, channel):
        first = channel.unary_stream(STREAM)(b"first")
        await until(lambda: echo.num_received == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(ONCE)(b"second")
        error = errors.from_rpc_error(caught.value, "peer")
        assert (type(error), error.limit, error.retry_after_s) == (errors.Overloaded, "1", 7.0)
        assert await channel.unary_unary(HEALTH_CHECK)(b"alive") == b"alive"
        assert echo.num_received == 2, "the first one's, and the health check's"
        echo.may_answer.set()
        assert len([answer async for answer in first]) == 2
        await until(lambda: limits.num_calls == 0)
        assert await channel.unary_unary(ONCE)(b"third") == b"third"


async def test_a_request_is_kept_no_longer_than_the_service_wants_it() -> None:
    async with serving(CallLimits(9)) as (echo, channel):
        call = channel.unary_stream(STREAM)(b"long" * 1000)
        await until(lambda: echo.num_received == 1)
        await until(lambda: echo.requests[0]() is None)
        call.cancel()


async def test_who_sends_no_request_loses_the_call_and_those_behind_are_served() -> None:
    async with serving(limits := CallLimits(2 * MAX_READING, read_timeout_s=0.2)) as (echo, channel):
        echo.may_answer.set()
        silent = [channel.stream_stream(STREAM)(never()) for _ in range(MAX_READING_PER_HOST)]
        await until(lambda: limits.num_calls == MAX_READING_PER_HOST)
        codes = [await call.code() for call in silent]
        assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert await channel.unary_unary(ONCE)(b"a") == b"a"


async def test_whose_turn_does_not_come_is_told_to_come_again() -> None:
    limits = CallLimits(2 * MAX_READING, lambda: 3.0, read_timeout_s=4.0)
    hosts = [f"127.0.0.{number}" for number in range(2, 2 + MAX_READING // MAX_READING_PER_HOST)]
    async with serving(limits) as (echo, channel), AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(coming_from(host, echo.port)) for host in hosts]
        silent = [relay.stream_stream(STREAM)(never()) for relay in relays for _ in range(MAX_READING_PER_HOST)]
        await until(lambda: limits.num_calls == MAX_READING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(ONCE)(b"a")
        error = errors.from_rpc_error(caught.value, "peer")
        assert (type(error), error.retry_after_s, echo.num_received) == (errors.Overloaded, 3.0, 0)
        assert error.limit == str(MAX_READING)
        assert await channel.unary_unary(HEALTH_CHECK)(b"alive") == b"alive"
        for call in silent:
            call.cancel()


async def test_one_host_cannot_keep_the_others_waiting() -> None:
    limits = CallLimits(2 * MAX_READING, lambda: 3.0, read_timeout_s=2 * TIMEOUT_S)
    async with serving(limits) as (echo, channel), coming_from("127.0.0.2", echo.port) as other:
        silent = [channel.stream_stream(STREAM)(never()) for _ in range(MAX_READING)]
        await until(lambda: limits.num_calls == MAX_READING)
        assert await other.unary_unary(ONCE)(b"a") == b"a"
        for call in silent:
            call.cancel()


async def test_the_host_that_has_its_share_is_told_so() -> None:
    limits = CallLimits(2 * MAX_READING, lambda: 3.0, read_timeout_s=4.0)
    async with serving(limits) as (_, channel):
        silent = [channel.stream_stream(STREAM)(never()) for _ in range(MAX_READING_PER_HOST)]
        await until(lambda: limits.num_calls == MAX_READING_PER_HOST)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(ONCE)(b"a")
        error = errors.from_rpc_error(caught.value, "peer")
        assert (type(error), error.limit, error.retry_after_s) == (errors.Overloaded, str(MAX_READING_PER_HOST), 3.0)
        for call in silent:
            call.cancel()
        await until(lambda: limits.num_calls == 0)
        assert await channel.unary_unary(ONCE)(b"b") == b"b"


async def test_a_call_without_a_request_is_refused() -> None:
    async with serving(CallLimits(1)) as (_, channel):

        async def nothing() -> AsyncIterator[bytes]:
            for data in ():
                yield data

        call = channel.stream_stream(STREAM)(nothing())
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_caller_that_goes_away_leaves_its_place() -> None:
    async with serving(limits := CallLimits(1)) as (echo, channel):
        call = channel.unary_stream(STREAM)(b"a")
        await until(lambda: echo.num_received == 1)
        call.cancel()
        await until(lambda: limits.num_calls == 0)
        assert await channel.unary_unary(ONCE)(b"b") == b"b"

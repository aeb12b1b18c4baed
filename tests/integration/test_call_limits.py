"""The limits in front of a service: how many calls they let in, and what senders of requests can make it hold."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach.security.api_keys import Grant, new_entry, new_key
from stagecoach_router.frontend import call_limits
from stagecoach_router.frontend.auth_interceptor import HEALTH_CHECK, AuthInterceptor
from stagecoach_router.frontend.call_limits import (
    HEALTH_WATCH,
    MAX_HEALTH_CHECKS,
    MAX_HEALTH_WATCHES,
    MAX_REQUEST_STREAMS,
    METERED,
    QUICK_TURNS,
    CallLimits,
)
from stagecoach_router.tenants.fair_share import ALPHA
from stagecoach_router.tenants.tenants import MIN_REFUSALS_READ, Tenants
from tests.source_address import coming_from

TIMEOUT_S = 20.0
HOLD = b"this call does not end by itself"
TOKENIZE = "/stagecoach.v1.Inference/Tokenize"
STREAM, ONCE, FAIL, BOTH = "/test.Echo/Stream", "/test.Echo/Once", "/test.Echo/Fail", "/test.Echo/Both"


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
        if details.method in (STREAM, HEALTH_WATCH):
            return grpc.unary_stream_rpc_method_handler(self.stream, request_deserializer=self.receive)
        if details.method == FAIL:
            return grpc.unary_unary_rpc_method_handler(self.fail, request_deserializer=self.receive)
        if details.method == BOTH:
            return grpc.stream_stream_rpc_method_handler(self.both, request_deserializer=self.receive)
        if details.method in (ONCE, HEALTH_CHECK, TOKENIZE):
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
        await (asyncio.Event() if answer == HOLD else self.may_answer).wait()
        for _ in range(2):
            await context.write(answer)

    async def once(self, request: Message, context: grpc.aio.ServicerContext) -> bytes:
        return request.data

    async def fail(self, request: Message, context: grpc.aio.ServicerContext) -> bytes:
        assert request.data != b"bug"
        try:
            async with asyncio.timeout(TIMEOUT_S) as limit:  # which knows the call's task
                await asyncio.sleep(0)
                assert not limit.expired()
                raise errors.NotFound("there is none")
        except errors.NotFound as error:
            await abort(context, error)

    async def both(self, requests: AsyncIterator[Message], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.data


@asynccontextmanager
async def serving(limits: CallLimits, tenants: Tenants | None = None) -> AsyncIterator[tuple[Echo, grpc.aio.Channel]]:
    echo = Echo()
    server = grpc.aio.server(interceptors=[AuthInterceptor(tenants or Tenants(None, 0.0)), limits])
    server.add_generic_rpc_handlers((echo,))
    echo.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(TIMEOUT_S), grpc.aio.insecure_channel(f"127.0.0.1:{echo.port}") as channel:
        yield echo, channel
    await server.stop(None)


async def until(holds) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def num_calls(limits: CallLimits) -> int:
    """How many calls are open that are not of the sorts that are counted apart."""
    return len(limits._usual.calls)


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def held() -> AsyncIterator[bytes]:
    yield HOLD
    await asyncio.Event().wait()


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
        await until(lambda: num_calls(limits) == 0)
        assert await channel.unary_unary(ONCE)(b"third") == b"third"


async def test_who_sends_on_after_its_minute_is_used_up_is_refused_unread() -> None:
    assert TOKENIZE in METERED
    key = new_key()
    tenants = Tenants([new_entry(key, "ann", Grant(requests_per_minute=1))], time.monotonic())
    metadata = (("authorization", f"Bearer {key}"),)
    ann = tenants.identify(metadata)
    with ann.admit(time.monotonic()):
        pass
    async with serving(CallLimits(8), tenants) as (echo, channel):
        call = channel.unary_unary(TOKENIZE)
        await call(b"x", metadata=metadata)  # it may be one that comes back for its answer
        for _ in range(MIN_REFUSALS_READ):
            with contextlib.suppress(errors.RateLimited), ann.admit(time.monotonic()):
                raise AssertionError("the minute's call is used up")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"x", metadata=metadata)
        error = errors.from_rpc_error(caught.value, "router")
        assert type(error) is errors.RateLimited
        assert 0 < error.retry_after_s < 2
        assert echo.num_received == 1
        assert await channel.unary_unary(ONCE)(b"x", metadata=metadata) == b"x", "what has no rate is let in"


async def test_a_request_is_kept_no_longer_than_the_service_wants_it() -> None:
    async with serving(CallLimits(9)) as (echo, channel):
        call = channel.unary_stream(STREAM)(b"long" * 1000)
        await until(lambda: echo.num_received == 1)
        await until(lambda: echo.requests[0]() is None)
        call.cancel()


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """So that nothing comes to an end by accident."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collector")
async def test_however_a_call_ends_its_place_is_free_at_once() -> None:
    async def nothing() -> AsyncIterator[bytes]:
        for data in ():
            yield data

    async with serving(limits := CallLimits(ALPHA, read_timeout_s=0.05)) as (echo, channel):
        echo.may_answer.set()
        left = channel.stream_stream(STREAM)(held())
        await until(lambda: echo.num_received == 1)
        left.cancel()
        ends = {
            "answered": channel.unary_unary(ONCE)(b"a"),
            "a stream": channel.stream_stream(STREAM)(one()),
            "no request": channel.stream_stream(ONCE)(nothing()),
            "too late": channel.stream_stream(ONCE)(never()),
            "wrong": channel.unary_unary(FAIL)(b"a"),
            "a bug": channel.unary_unary(FAIL)(b"bug"),
            "a stream of requests": channel.stream_stream(BOTH)(one()),
            "a stream without any": channel.stream_stream(BOTH)(never()),
        }
        codes = {name: await code_of(call) for name, call in ends.items()}
        assert codes == {
            "answered": "OK",
            "a stream": "OK",
            "no request": "INVALID_ARGUMENT",
            "too late": "DEADLINE_EXCEEDED",
            "wrong": "NOT_FOUND",
            "a bug": "UNKNOWN",
            "a stream of requests": "OK",
            "a stream without any": "DEADLINE_EXCEEDED",
        }
        await until(lambda: num_calls(limits) == 0)


async def code_of(call: grpc.aio.Call) -> str:
    """How a call ends, of which everything is read."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            assert [answer async for answer in call]
    return (await call.code()).name


async def test_who_sends_no_request_loses_the_call_and_those_behind_are_served() -> None:
    async with serving(limits := CallLimits(9, read_timeout_s=0.2)) as (echo, channel):
        echo.may_answer.set()
        silent = [channel.stream_stream(STREAM)(never()) for _ in range(4)]
        codes = [await call.code() for call in silent]
        assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
        await until(lambda: num_calls(limits) == 0)
        assert await channel.unary_unary(ONCE)(b"a") == b"a"


async def test_senders_that_send_nothing_keep_neither_their_own_host_nor_another_waiting() -> None:
    async with (
        serving(limits := CallLimits(2 * QUICK_TURNS)) as (echo, channel),
        coming_from("127.0.0.2", echo.port) as other,
    ):
        silent = [channel.stream_stream(STREAM)(never()) for _ in range(QUICK_TURNS)]
        await until(lambda: num_calls(limits) == QUICK_TURNS)
        assert await other.unary_unary(ONCE)(b"a") == b"a"
        assert await channel.unary_unary(ONCE)(b"b") == b"b"
        for call in silent:
            call.cancel()


@pytest.mark.parametrize(
    ("method", "size"),
    [
        (STREAM, 90),
        (HEALTH_WATCH, MAX_HEALTH_WATCHES),
        (HEALTH_CHECK, MAX_HEALTH_CHECKS),
        (BOTH, MAX_REQUEST_STREAMS),
    ],
)
async def test_of_no_sort_of_calls_can_one_host_open_all_and_none_is_in_the_way_of_another(
    method: str, size: int
) -> None:
    """Before, idle streams of requests, watches, and checks that stall locked everyone out."""
    async with (
        serving(CallLimits(90)) as (echo, channel),
        coming_from("127.0.0.2", echo.port) as other,
    ):
        sent = never if method == HEALTH_CHECK else held
        calls = [channel.stream_stream(method)(sent()) for _ in range(size)]
        refused, _ = await asyncio.wait(
            [asyncio.ensure_future(call.code()) for call in calls], return_when=asyncio.FIRST_COMPLETED
        )
        assert {await code for code in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        others = {STREAM, HEALTH_WATCH, HEALTH_CHECK, BOTH} - {method}
        for each in others:
            assert await first_answer(echo, channel, each) == b"x", (
                "calls of other sorts are let in, from there as well"
            )
        assert await first_answer(echo, other, method) == b"x", "and so are other hosts' of this sort"
        for call in calls:
            call.cancel()


async def test_who_has_probed_before_is_answered_when_strangers_hold_all_places_of_health_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(call_limits, "MAX_HEALTH_CHECKS", 1)
    async with (
        serving(CallLimits(8)) as (echo, channel),
        coming_from("127.0.0.2", echo.port) as stranger,
        coming_from("127.0.0.3", echo.port) as newcomer,
    ):
        assert await channel.unary_unary(HEALTH_CHECK)(b"a") == b"a"
        silent = stranger.stream_stream(HEALTH_CHECK)(never())
        while await is_let_in(newcomer):  # it came before the stranger's call
            silent.cancel()
            silent = stranger.stream_stream(HEALTH_CHECK)(never())
        for _ in range(20):
            assert await channel.unary_unary(HEALTH_CHECK)(b"b") == b"b"
        silent.cancel()


async def is_let_in(channel: grpc.aio.Channel) -> bool:
    call = channel.stream_stream(HEALTH_CHECK)(never())
    try:
        code = await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(call.code())), 0.2)
    except TimeoutError:
        return True
    finally:
        call.cancel()
    return code is not grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_there_is_room_for_calls_of_all_places_however_many_pipelines_there_are() -> None:
    num_places = 0
    async with serving(limits := CallLimits(1, num_places=lambda: num_places)) as (_, channel):
        held = [channel.unary_stream(STREAM)(HOLD)]
        await until(lambda: num_calls(limits) == 1)
        num_places = 20
        held += [channel.unary_stream(STREAM)(HOLD) for _ in range(15)]
        await until(lambda: num_calls(limits) == 16)
        for call in held:
            call.cancel()


async def one() -> AsyncIterator[bytes]:
    yield b"x"


async def first_answer(echo: Echo, channel: grpc.aio.Channel, method: str) -> bytes:
    echo.may_answer.set()
    call = channel.stream_stream(method)(one())
    answer = await call.read()
    call.cancel()
    return answer


async def test_who_takes_no_answer_is_cut_off_and_its_calls_keep_their_places_until_grpc_has_ended_them() -> None:
    """Else it could have more and more calls that only gRPC knows of. One that answers once is one like any other."""
    window = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]

    async def long() -> AsyncIterator[bytes]:
        yield bytes(1 << 21)

    async with (
        serving(limits := CallLimits(ALPHA, max_stall_s=0.1)) as (echo, channel),
        grpc.aio.insecure_channel(f"127.0.0.1:{echo.port}", options=window) as slow,
    ):
        calls = [slow.stream_stream(ONCE)(long()) for _ in range(3)]
        await until(lambda: echo.num_received == 3)
        assert num_calls(limits) == 3
        await until(lambda: num_handlers(ONCE) == 0)
        assert num_calls(limits) == 3
        assert await channel.unary_unary(ONCE)(b"a") == b"a"
        assert len(await calls[0].read()) == 1 << 21
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls[0].read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await until(lambda: num_calls(limits) == 2)
        for call in calls:
            call.cancel()
        await until(lambda: num_calls(limits) == 0)


def num_handlers(method: str) -> int:
    """How many calls of a method are being served: gRPC names their tasks so."""
    return sum(task.get_name() == f"HandleExceptions[{method}]" for task in asyncio.all_tasks())


async def test_a_stream_of_requests_that_is_left_idle_ends() -> None:
    async with serving(CallLimits(1, max_stall_s=0.1)) as (_, channel):
        call = channel.stream_stream(BOTH)()
        await call.write(b"a")
        assert await call.read() == b"a"
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_of_requests_is_answered_as_without_limits() -> None:
    async with serving(CallLimits(1)) as (_, channel):

        async def some() -> AsyncIterator[bytes]:
            for data in (b"a", b"b", b"c"):
                yield data

        assert [answer async for answer in channel.stream_stream(BOTH)(some())] == [b"a", b"b", b"c"]


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
        await until(lambda: num_calls(limits) == 0)
        assert await channel.unary_unary(ONCE)(b"b") == b"b"

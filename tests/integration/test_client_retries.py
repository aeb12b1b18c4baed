"""What both clients try again, for how long, and what ends an attempt or the wait for the next one."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

import stagecoach_client as sdk
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_client.settings import DEFAULT_MAX_RETRIES
from tests.integration.either_client import KINDS, EitherClient, Kind
from tests.integration.fake_router import FakeRouter, serving, words


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
async def client(router: FakeRouter, kind: Kind) -> AsyncIterator[EitherClient]:
    with serving(router) as address:
        async with kind.connect(address) as client:
            yield client


async def came(event: threading.Event, timeout_s: float = 10) -> bool:
    """Whether it happens in time to the router, which has threads of its own."""
    return await asyncio.to_thread(event.wait, timeout_s)


async def test_the_deadline_ends_a_call(client: EitherClient, router: FakeRouter) -> None:
    await client.models()  # connects
    router.stay_open = True
    with pytest.raises(sdk.DeadlineExceeded):
        await client.generate("x", timeout_s=0.2)
    assert await came(router.caller_left)


@pytest.mark.parametrize("method", ["generate", "tokenize"])
@pytest.mark.parametrize("failure", [sdk.Unavailable("starting"), sdk.Overloaded("full", retry_after_s=0.1)])
async def test_what_was_refused_is_tried_again(
    router: FakeRouter, client: EitherClient, failure: sdk.StagecoachError, method: str
) -> None:
    router.failures += [failure, failure]
    assert await getattr(client, method)("x", timeout_s=5)
    assert len(router.requests) == 3
    assert router.timeouts_s[2] < router.timeouts_s[0] - 0.1  # one deadline for all of them


async def test_what_grpc_itself_refuses_for_want_of_room_is_tried_again(router: FakeRouter, kind: Kind) -> None:
    router.stay_open = True
    with serving(router, max_calls=1) as address:
        async with kind.connect(address) as first, kind.connect(address, max_retries=0) as second:
            stream = await first.generate("x", stream=True)
            await anext(stream)
            with pytest.raises(sdk.Overloaded) as caught:
                await second.models()
            assert caught.value.retry_after_s > 0
            await stream.aclose()
            assert await came(router.caller_left)
            assert (await first.models())[0].name == "tiny"


async def test_a_server_that_dies_before_the_first_token_is_asked_again(router: FakeRouter, kind: Kind) -> None:
    router.stay_open, router.answer = True, lambda request: iter(())
    with serving(router) as address:
        client = kind.connect(address)
        answer = asyncio.create_task(client.generate("x", timeout_s=20))
        assert await came(router.begun)
    again = FakeRouter()
    async with client:
        with serving(again, address):
            assert (await answer).text == "Hello, world"
    assert router.requests[0].request_id == again.requests[0].request_id != ""


async def test_retries_end(router: FakeRouter, client: EitherClient) -> None:
    router.failures += [sdk.Unavailable("starting")] * (DEFAULT_MAX_RETRIES + 2)
    with pytest.raises(sdk.Unavailable):
        await client.status()
    assert len(router.requests) == DEFAULT_MAX_RETRIES + 1


async def test_a_server_that_says_when_to_come_back_is_not_asked_before(
    router: FakeRouter, client: EitherClient
) -> None:
    router.failures.append(sdk.Unavailable("no pipeline yet", retry_after_s=0.3))
    assert (await client.generate("x", timeout_s=5)).text == "Hello, world"
    assert router.timeouts_s[1] < router.timeouts_s[0] - 0.25


@pytest.mark.parametrize(
    ("method", "closes"), [("stream", "stream"), ("stream", "client"), ("generate", "client"), ("models", "client")]
)
async def test_closing_ends_the_wait_for_the_next_attempt(
    router: FakeRouter, client: EitherClient, method: str, closes: str
) -> None:
    router.failures.append(sdk.Unavailable("starting", retry_after_s=10.0))
    stream = await client.generate("x", stream=True) if method == "stream" else None
    calls = {"stream": lambda: anext(stream), "generate": lambda: client.generate("x"), "models": client.models}
    caller = asyncio.ensure_future(calls[method]())
    assert await came(router.failed)
    await asyncio.wait([caller], timeout=0.2)  # the failure reaches it, and it begins to wait
    assert not caller.done()
    await (stream if closes == "stream" else client).aclose()
    with pytest.raises(sdk.Cancelled):
        async with asyncio.timeout(9.5):
            await caller
    assert len(router.requests) == 1


@pytest.mark.parametrize("failure", [sdk.Overloaded("full"), sdk.ShardFault("stage 1"), sdk.InternalError("bug")])
async def test_other_failures_are_not_tried_again(
    router: FakeRouter, client: EitherClient, failure: sdk.StagecoachError
) -> None:
    router.failures.append(failure)
    with pytest.raises(type(failure)):
        await client.generate("x")
    assert len(router.requests) == 1


async def test_a_stream_that_breaks_goes_on_without_a_gap_or_a_repeat(client: EitherClient, router: FakeRouter) -> None:
    """At the first break both completions have two of three tokens; at the second, one of them has ended."""

    def breaking(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        firsts, lasts = list(words(request))[:2], list(words(request))[2:]
        if not request.from_tokens:
            yield from firsts
        elif list(request.from_tokens) == [2, 2]:
            yield lasts[0]
        else:
            yield lasts[1]
            return
        raise sdk.Unavailable("gone")

    router.answer = breaking
    stream = await client.generate("x", n=2, stream=True)
    generation = await stream.collect()
    assert [(each.text, each.token_ids) for each in generation.completions] == [("Hello, world", (1, 2, 3))] * 2
    assert [list(request.from_tokens) for request in router.requests] == [[], [2, 2], [3, 2]]
    assert len({request.request_id for request in router.requests}) == 1


async def test_after_the_first_chunk_only_the_rest_is_asked_for(client: EitherClient, router: FakeRouter) -> None:
    def broken(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        if request.from_tokens:
            raise sdk.FailedPrecondition("not known here", field="from_tokens")
        yield next(words(request))
        raise sdk.Unavailable("gone")

    router.answer = broken
    stream = await client.generate("x", stream=True)
    assert (await anext(stream)).text == "Hello"
    with pytest.raises(sdk.Unavailable, match="gone"):
        await anext(stream)
    first, second = router.requests
    assert (list(first.from_tokens), list(second.from_tokens)) == ([], [2])
    assert first.request_id == second.request_id != ""
    assert [chunk async for chunk in stream] == []
    with pytest.raises(sdk.Unavailable, match="gone"):
        await stream.collect()


async def test_an_address_where_nobody_listens_is_unavailable_at_once(kind: Kind) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        began = time.monotonic()
        async with kind.connect(address, max_retries=0) as client:
            with pytest.raises(sdk.Unavailable, match=address):
                await client.generate("x")
        assert time.monotonic() - began < DEFAULT_CONNECT_TIMEOUT_S


async def test_an_address_that_does_not_answer_is_unavailable_after_the_connect_timeout(kind: Kind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        async with kind.connect(address, connect_timeout_s=0.5, max_retries=0) as client:
            with pytest.raises(sdk.Unavailable):
                await client.generate("x")
        assert 0.3 < time.monotonic() - began < 3


async def test_retries_reach_a_server_that_comes_up_late(kind: Kind) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    async with kind.connect(address, max_retries=20) as client:
        caller = asyncio.create_task(client.generate("x"))
        await asyncio.sleep(0)  # it has begun
        with serving(FakeRouter(), address):
            async with asyncio.timeout(15):
                assert (await caller).text == "Hello, world"

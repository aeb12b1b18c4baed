"""What both clients promise, blocking and asyncio, against a scripted router over real gRPC."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

import stagecoach_client as sdk
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_client.settings import DEFAULT_MAX_RETRIES
from tests.integration.either_client import KINDS, EitherClient, Kind
from tests.integration.fake_router import FakeRouter, counting, serving, words


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


async def test_generate_returns_every_completion(client: EitherClient) -> None:
    generation = await client.generate("Say hello", n=2)
    assert [(c.index, c.text, c.token_ids, c.finish_reason) for c in generation.completions] == [
        (0, "Hello, world", (1, 2, 3), "length"),
        (1, "Hello, world", (1, 2, 3), "length"),
    ]
    assert generation.text == "Hello, world"
    assert generation.request_id == "r-1"
    assert generation.usage == sdk.Usage(prompt_tokens=5, cached_tokens=0, completion_tokens=6)


async def test_generate_sends_what_it_was_given(client: EitherClient, router: FakeRouter) -> None:
    await client.generate(
        token_ids=[5, 6], temperature=0.0, stop="end", seed=3, model="tiny", request_id="mine", priority=-2
    )
    await client.generate(messages=[{"role": "user", "content": "hi"}])
    request, chat = router.requests
    assert list(request.token_ids.ids) == [5, 6]
    assert (request.model, request.request_id, request.priority) == ("tiny", "mine", -2)
    assert (request.sampling.temperature, list(request.sampling.stop), request.sampling.seed) == (0.0, ["end"], 3)
    assert not request.sampling.HasField("max_tokens")
    assert [(message.role, message.content) for message in chat.chat.messages] == [("user", "hi")]


async def test_generate_rejects_bad_arguments_before_it_sends_them(client: EitherClient, router: FakeRouter) -> None:
    with pytest.raises(sdk.InvalidArgument, match="top_p"):
        await client.generate("x", top_p=2.0, stream=True)
    assert router.requests == []


async def test_stream_gives_chunks_as_they_come_and_collects_them(client: EitherClient) -> None:
    async with await client.generate("x", stream=True) as stream:
        first = await anext(stream)
        assert first == sdk.Chunk(0, "Hello", (1, 2), (), None, None)
        assert stream.request_id == "r-1"
        generation = await stream.collect()
    assert generation.text == "Hello, world"
    assert [chunk async for chunk in stream] == []
    assert await stream.collect() == generation


async def test_many_calls_run_at_a_time(client: EitherClient, router: FakeRouter) -> None:
    router.answer = counting
    generations = await asyncio.gather(*(client.generate("x", max_tokens=50 + index) for index in range(12)))
    assert [len(generation.completions[0].token_ids) for generation in generations] == list(range(50, 62))


async def test_long_answers_arrive_whole(client: EitherClient, router: FakeRouter) -> None:
    router.answer = counting
    assert len((await client.generate("x", max_tokens=999)).completions[0].token_ids) == 999


async def test_tokenize_models_and_status(client: EitherClient, router: FakeRouter) -> None:
    messages: list[sdk.Message] = [{"role": "user", "content": "hi"}]
    assert await client.tokenize(messages=messages) == sdk.Tokenization((1, 2, 3), 512)
    assert router.requests[0].chat.messages[0].content == "hi"
    assert [(model.name, model.vocab_size) for model in await client.models()] == [("tiny", 100)]
    status = await client.status()
    assert status.ready
    assert status.num_running == 2
    stages = status.pipelines[0].stages
    assert [(s.first_layer, s.end_layer, s.dtype, s.busy_fraction) for s in stages] == [
        (0, 10, "bfloat16", 0.75),
        (10, 30, "bfloat16", 0.75),
    ]


async def test_leaving_a_stream_cancels_it_on_the_server(router: FakeRouter, client: EitherClient) -> None:
    router.stay_open = True
    async with await client.generate("x", stream=True) as stream:
        async for _ in stream:
            break
    assert await came(router.caller_left)
    with pytest.raises(sdk.Cancelled):
        await stream.collect()


async def test_dropping_a_stream_cancels_it_on_the_server(router: FakeRouter, client: EitherClient) -> None:
    router.stay_open = True
    async for _ in await client.generate("x", stream=True):
        break
    gc.collect()
    assert await came(router.caller_left)


async def test_closing_a_stream_wakes_its_reader(router: FakeRouter, client: EitherClient) -> None:
    router.answer, router.stay_open = lambda request: iter(()), True
    stream = await client.generate("x", stream=True)
    reader = asyncio.create_task(stream.collect())
    assert await came(router.begun)
    await stream.aclose()
    with pytest.raises(sdk.Cancelled):
        await reader


@pytest.mark.parametrize("method", ["generate", "tokenize"])
async def test_closing_the_client_ends_its_calls(router: FakeRouter, client: EitherClient, method: str) -> None:
    router.answer, router.stay_open = lambda request: iter(()), True
    reader = asyncio.create_task(getattr(client, method)("x"))
    assert await came(router.begun)
    await client.aclose()
    with pytest.raises(sdk.Cancelled):
        await reader


async def test_a_closed_client_says_so(client: EitherClient) -> None:
    await client.aclose()
    await client.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("x")
    with pytest.raises(RuntimeError, match="closed"):
        await client.status()


async def test_errors_keep_their_class_and_facts(router: FakeRouter, client: EitherClient) -> None:
    router.failures.append(sdk.OutOfRange("prompt is too long", field="prompt", limit=512, value=600))
    with pytest.raises(sdk.OutOfRange, match="too long") as caught:
        await client.generate("x")
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("prompt", "512", "600")
    assert isinstance(caught.value.__cause__, grpc.RpcError)


async def test_a_status_without_detail_gets_the_class_of_its_code(router: FakeRouter, client: EitherClient) -> None:
    router.failures.append(grpc.StatusCode.NOT_FOUND)
    with pytest.raises(sdk.NotFound, match="no detail"):
        await client.tokenize("x")


async def test_a_server_that_cancels_is_an_error_of_the_server(router: FakeRouter, client: EitherClient) -> None:
    """Not a CancelledError of asyncio: nobody has cancelled the task."""
    router.failures += [grpc.StatusCode.CANCELLED] * 2
    with pytest.raises(sdk.Cancelled):
        await client.generate("x")
    with pytest.raises(sdk.Cancelled):
        await client.status()


async def test_an_answer_that_stops_short_is_an_error(client: EitherClient, router: FakeRouter) -> None:
    router.answer = lambda request: iter([pb.GenerateResponse(text="Hel", token_ids=[1])])
    with pytest.raises(sdk.InternalError, match="before the end of completion 0"):
        await client.generate("x")


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


async def test_a_channel_that_came_in_is_left_open(router: FakeRouter, kind: Kind) -> None:
    with serving(router) as address:
        async with kind.channel(address) as channel:
            for _ in range(2):  # the second one finds it open
                async with kind.connect(channel=channel) as client:
                    assert await client.models()


async def test_closing_the_client_of_a_given_channel_ends_its_calls_alone(router: FakeRouter, kind: Kind) -> None:
    router.stay_open = True
    with serving(router) as address:
        async with kind.channel(address) as channel:
            client, other = kind.connect(channel=channel), kind.connect(channel=channel)
            async with (
                await client.generate("x", stream=True) as stream,
                await other.generate("y", stream=True) as rest,
            ):
                assert (await anext(stream)).text == (await anext(rest)).text == "Hello"
                await client.aclose()
                with pytest.raises(sdk.Cancelled):
                    await stream.collect()
                assert (await anext(rest)).text == ", world"


@pytest.mark.parametrize(
    ("target", "name"), [({}, "the given channel: "), ({"target": "router.example:1"}, "router.example:1: ")]
)
async def test_errors_of_a_given_channel_do_not_name_the_default_target(
    kind: Kind, target: dict[str, str], name: str
) -> None:
    async with kind.channel("127.0.0.1:1") as channel:
        client = kind.connect(**target, channel=channel, max_retries=0)
        for call in (client.models, lambda: client.generate("x")):
            with pytest.raises(sdk.Unavailable) as caught:
                await call()
            assert caught.value.message.startswith(name)

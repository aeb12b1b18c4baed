"""What both clients promise, blocking and asyncio, against a scripted router over real gRPC."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator

import grpc
import pytest

import stagecoach_client as sdk
from stagecoach.v1 import inference_pb2 as pb
from tests.integration.either_client import KINDS, EitherClient, Kind
from tests.integration.fake_router import FakeRouter, counting, serving


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


@pytest.mark.parametrize("linger_s", [0.0, 60.0])
async def test_leaving_a_stream_that_would_linger_ends_its_request_by_name(
    router: FakeRouter, client: EitherClient, linger_s: float
) -> None:
    router.stay_open = True
    async with await client.generate("x", stream=True, linger_s=linger_s, request_id="mine") as stream:
        await anext(stream)
    assert router.cancelled == (["mine"] if linger_s else [])


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

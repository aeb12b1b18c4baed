"""The asyncio client against a scripted router, over real gRPC."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator

import grpc
import pytest

import stagecoach_client as sdk
from stagecoach_client import AsyncClient
from tests.integration.fake_router import FakeRouter, counting, serving


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
async def client(router: FakeRouter) -> AsyncIterator[AsyncClient]:
    with serving(router) as address:
        async with AsyncClient(address) as client:
            yield client


async def left(router: FakeRouter) -> bool:
    return await asyncio.to_thread(router.caller_left.wait, 5)


async def test_generate_returns_the_whole(client: AsyncClient) -> None:
    generation = await client.generate(messages=[{"role": "user", "content": "hi"}])
    assert generation.text == "Hello, world"
    assert generation.usage.completion_tokens == 3


async def test_stream_gives_chunks_and_collects_them(client: AsyncClient) -> None:
    async with await client.generate("x", stream=True) as stream:
        texts = [chunk.text async for chunk in stream]
        assert texts == ["Hello", ", world"]
        assert (await stream.collect()).text == "Hello, world"


async def test_many_calls_run_at_a_time(client: AsyncClient, router: FakeRouter) -> None:
    router.answer = counting
    generations = await asyncio.gather(*(client.generate("x", max_tokens=50 + index) for index in range(12)))
    assert [len(generation.completions[0].token_ids) for generation in generations] == list(range(50, 62))


async def test_leaving_a_stream_cancels_it_on_the_server(client: AsyncClient, router: FakeRouter) -> None:
    router.stay_open = True
    async with await client.generate("x", stream=True) as stream:
        async for _ in stream:
            break
    assert await left(router)
    with pytest.raises(sdk.Cancelled):
        await stream.collect()


async def test_dropping_a_stream_cancels_it_on_the_server(client: AsyncClient, router: FakeRouter) -> None:
    router.stay_open = True
    stream = await client.generate("x", stream=True)
    await anext(stream)
    del stream
    gc.collect()
    assert await left(router)


@pytest.mark.parametrize("whole", [True, False])
async def test_cancelling_the_task_cancels_the_call(client: AsyncClient, router: FakeRouter, whole: bool) -> None:
    await client.models()  # connects
    router.stay_open = True

    async def call() -> None:
        if whole:
            await client.generate("x")
        else:
            async for _ in await client.generate("x", stream=True):
                pass

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await call()
    assert await left(router)


async def test_closing_from_another_task_wakes_the_reader(client: AsyncClient, router: FakeRouter) -> None:
    router.answer, router.stay_open = lambda request: iter(()), True
    stream = await client.generate("x", stream=True)
    reader = asyncio.create_task(stream.collect())
    await asyncio.to_thread(router.begun.wait, 5)
    await stream.aclose()
    with pytest.raises(sdk.Cancelled):
        await reader


@pytest.mark.parametrize("method", ["generate", "tokenize"])
async def test_closing_the_client_ends_its_calls(router: FakeRouter, method: str) -> None:
    router.answer, router.stay_open = lambda request: iter(()), True
    with serving(router) as address:
        client = AsyncClient(address)
        reader = asyncio.create_task(getattr(client, method)("x"))
        await asyncio.to_thread(router.begun.wait, 5)
        await client.aclose()
        with pytest.raises(sdk.Cancelled):
            await reader
        with pytest.raises(RuntimeError, match="closed"):
            await client.status()


async def test_a_server_that_cancels_does_not_look_like_a_cancelled_task(
    client: AsyncClient, router: FakeRouter
) -> None:
    router.failures += [grpc.StatusCode.CANCELLED] * 2
    with pytest.raises(sdk.Cancelled):
        await client.generate("x")
    with pytest.raises(sdk.Cancelled):
        await client.status()


async def test_errors_keep_their_class_and_facts(client: AsyncClient, router: FakeRouter) -> None:
    router.failures.append(sdk.NotFound("no such model", field="model", value="huge"))
    with pytest.raises(sdk.NotFound) as caught:
        await client.generate("x", model="huge")
    assert (caught.value.field, caught.value.value) == ("model", "huge")


async def test_what_was_refused_is_tried_again(client: AsyncClient, router: FakeRouter) -> None:
    router.failures += [sdk.Unavailable("starting"), sdk.Overloaded("full", retry_after_s=0.01)]
    assert (await client.generate("x")).text == "Hello, world"
    router.failures += [sdk.Unavailable("starting")]
    assert (await client.tokenize("x")).context_length == 512
    assert len(router.requests) == 5


@pytest.mark.parametrize("method", ["generate", "tokenize"])
async def test_closing_ends_the_wait_for_the_next_attempt(client: AsyncClient, router: FakeRouter, method: str) -> None:
    router.failures.append(sdk.Unavailable("starting", retry_after_s=10.0))
    caller = asyncio.create_task(getattr(client, method)("x"))
    assert await asyncio.to_thread(router.failed.wait, 10)
    await asyncio.wait([caller], timeout=0.2)  # the failure reaches it, and it begins to wait
    await client.aclose()
    with pytest.raises(sdk.Cancelled):
        async with asyncio.timeout(9.5):
            await caller
    assert len(router.requests) == 1


async def test_errors_of_a_given_channel_do_not_name_the_default_target() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        client = AsyncClient(channel=channel, max_retries=0)
        for call in (client.models, lambda: client.generate("x")):
            with pytest.raises(sdk.Unavailable) as caught:
                await call()
            assert caught.value.message.startswith("the given channel: ")


async def test_other_failures_are_not_tried_again(client: AsyncClient, router: FakeRouter) -> None:
    router.failures += [sdk.ShardFault("stage 1")]
    with pytest.raises(sdk.ShardFault):
        await client.generate("x")
    assert len(router.requests) == 1


async def test_the_deadline_ends_a_call(client: AsyncClient, router: FakeRouter) -> None:
    await client.models()  # connects
    router.stay_open = True
    with pytest.raises(sdk.DeadlineExceeded):
        await client.generate("x", timeout_s=0.2)


async def test_models_and_status(client: AsyncClient) -> None:
    assert (await client.models())[0].vocab_size == 100
    assert (await client.status()).pipelines[0].ready


async def test_an_address_where_nobody_listens_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with AsyncClient(f"127.0.0.1:{unused.getsockname()[1]}") as client:
            with pytest.raises(sdk.Unavailable):
                await client.generate("x")


def test_a_client_may_be_made_outside_of_the_loop_and_outlive_it(router: FakeRouter) -> None:
    router.stay_open = True
    with serving(router) as address:
        client = AsyncClient(address)
        kept = []

        async def call() -> None:
            stream = await client.generate("x", stream=True)
            kept.append(stream)
            await anext(stream)

        asyncio.run(call())
        kept.clear()  # its loop is gone; must not complain
        gc.collect()
        assert router.caller_left.wait(5)

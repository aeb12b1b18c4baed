"""What is particular to the asyncio client: cancelled tasks and event loops. The rest is in test_client.py."""

from __future__ import annotations

import asyncio
import gc

import pytest

from stagecoach_client import AsyncClient
from tests.integration.fake_router import FakeRouter, serving


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.mark.parametrize("whole", [True, False])
async def test_cancelling_the_task_cancels_the_call(router: FakeRouter, whole: bool) -> None:
    async def call(client: AsyncClient) -> None:
        if whole:
            await client.generate("x")
        else:
            async for _ in await client.generate("x", stream=True):
                pass

    with serving(router) as address:
        async with AsyncClient(address) as client:
            await client.models()  # connects
            router.stay_open = True
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await call(client)
            assert await asyncio.to_thread(router.caller_left.wait, 5)


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

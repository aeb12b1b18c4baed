"""The health service tells everybody, whoever else watches, leaves or does not read."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stagecoach.rpc.health import LIVENESS, Health

TIMEOUT_S = 20.0
SERVICE = "some.Service"


@asynccontextmanager
async def served():
    server = grpc.aio.server()
    health = Health(server, SERVICE)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health, HealthStub(channel)
    await server.stop(None)


async def next_status(watch):
    async with asyncio.timeout(TIMEOUT_S):
        return (await watch.read()).status


async def test_a_process_is_alive_at_once_and_ready_when_it_says_so():
    async with served() as (health, stub):
        for name, status in (("", "NOT_SERVING"), (SERVICE, "NOT_SERVING"), (LIVENESS, "SERVING")):
            answer = await stub.Check(HealthCheckRequest(service=name))
            assert answer.status == HealthCheckResponse.ServingStatus.Value(status)
        health.set_ready(True)
        assert (await stub.Check(HealthCheckRequest())).status == HealthCheckResponse.SERVING


async def test_an_unknown_service_is_not_found_and_can_be_watched():
    async with served() as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Check(HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(HealthCheckRequest(service="other"))
        assert await next_status(watch) == HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


async def test_a_watcher_that_leaves_takes_nobody_with_it():
    async with served() as (health, stub):
        staying, leaving = (stub.Watch(HealthCheckRequest(service=SERVICE)) for _ in range(2))
        for watch in (staying, leaving):
            assert await next_status(watch) == HealthCheckResponse.NOT_SERVING
        leaving.cancel()
        for ready in (True, False, True):
            health.set_ready(ready)
            expected = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
            assert await next_status(staying) == expected
        staying.cancel()


async def test_saying_the_same_again_tells_a_watcher_nothing():
    async with served() as (health, stub):
        watch = stub.Watch(HealthCheckRequest())
        assert await next_status(watch) == HealthCheckResponse.NOT_SERVING
        health.set_ready(False)
        await stub.Check(HealthCheckRequest())
        health.set_ready(True)
        assert await next_status(watch) == HealthCheckResponse.SERVING
        watch.cancel()

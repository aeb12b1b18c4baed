"""What a shard answers is as large as it need be: gRPC refuses more, and payloads are no matter of that."""

import asyncio

import grpc
import grpc.aio
import pytest

from stagecoach import errors
from stagecoach.rpc.channel import dial_plainly
from stagecoach.rpc.shard_rpc import MAX_RESPONSE_BYTES, SERVICE_NAME, ShardStub
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.pipelines.shard_client import describe

LARGE = 3 << 20


async def _answer(request, context):
    return bytes([7 << 3 | 2]) + b"\x80\x80\xc0\x01" + bytes(LARGE)  # a device of so many bytes


async def _stream(requests, context):
    await context.write(bytes(LARGE))
    await asyncio.Event().wait()


@pytest.fixture
async def address():
    server = grpc.aio.server()
    handlers = {
        "Describe": grpc.unary_unary_rpc_method_handler(_answer),
        "Session": grpc.stream_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_a_description_is_small(address):
    with pytest.raises(errors.OutOfRange, match=f"larger than max.*{MAX_RESPONSE_BYTES['Describe']}"):
        await describe(address)


async def test_a_session_may_bring_much(address):
    async with dial_plainly(address) as channel:
        assert len(await ShardStub(channel).session().read()) == LARGE


def test_every_method_has_a_limit_but_the_one_with_payloads():
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["Shard"].methods}
    assert methods - MAX_RESPONSE_BYTES.keys() == {"Session"}

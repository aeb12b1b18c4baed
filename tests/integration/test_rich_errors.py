"""A gRPC client that has never heard of us learns what is wrong from the standard details."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import inference_pb2_grpc
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_router.frontend.auth_interceptor import AuthInterceptor
from stagecoach_router.frontend.grpc_service import InferenceService
from stagecoach_router.tenants.tenants import Tenants

TIMEOUT_S = 20.0


@pytest.fixture
async def address():
    """A router's public service without a pipeline behind it."""
    server = grpc.aio.server(interceptors=[AuthInterceptor(Tenants(None, 0.0))])
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def call(address: str) -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            InferenceStub(channel).Tokenize(pb.TokenizeRequest(prompt="hi"), timeout=TIMEOUT_S)
        return caught.value


async def test_a_plain_client_reads_reason_and_retry_delay(address: str) -> None:
    error = await asyncio.to_thread(call, address)
    status = rpc_status.from_call(error)  # which also compares code and message with the call's own
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert (info.reason, info.domain) == ("Unavailable", "stagecoach")
    assert retry.retry_delay.seconds >= 1

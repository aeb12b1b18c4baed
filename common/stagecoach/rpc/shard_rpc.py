"""The `Shard` service, as stub and as server handlers, whose messages with payloads stay bytes.

With the generated code protobuf would copy every payload twice. Here the streams that carry payloads take and give
`bytes`, which `stagecoach.rpc.framing` writes and reads.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc
import grpc.aio

from stagecoach.v1 import shard_pb2 as pb

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Shard"].full_name
# Of one row of a step's outputs: a shard refuses an output group that wants more.
MAX_CANDIDATES = 4096

# Of one answer in bytes. A session's may hold a payload: its limit is the channel's.
MAX_RESPONSE_BYTES = {"Describe": 16 << 10, "Assign": 16 << 10, "FetchFiles": 4 << 20, "Forward": 1 << 10}

StreamHandler = Callable[[object, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[None]]


def response_limits() -> str:
    """The service config by which gRPC refuses answers of a shard that are larger, before it makes objects of them."""
    limits = [
        {"name": [{"service": SERVICE_NAME, "method": method}], "maxResponseMessageBytes": limit}
        for method, limit in MAX_RESPONSE_BYTES.items()
    ]
    return json.dumps({"methodConfig": limits})


class ShardStub:
    """Calls of one shard. `session` yields framed SessionResponses; `forward` takes framed MicroBatches."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        prefix = f"/{SERVICE_NAME}/"
        self.describe = channel.unary_unary(
            prefix + "Describe",
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.DescribeResponse.FromString,
        )
        self.fetch_files = channel.unary_stream(
            prefix + "FetchFiles",
            request_serializer=pb.FetchFilesRequest.SerializeToString,
            response_deserializer=pb.FileChunk.FromString,
        )
        self.assign = channel.unary_unary(
            prefix + "Assign",
            request_serializer=pb.AssignRequest.SerializeToString,
            response_deserializer=pb.AssignResponse.FromString,
        )
        self.session: grpc.aio.StreamStreamMultiCallable[pb.SessionRequest, bytes] = channel.stream_stream(
            prefix + "Session", request_serializer=pb.SessionRequest.SerializeToString
        )
        self.forward: grpc.aio.StreamStreamMultiCallable[bytes, pb.ForwardResponse] = channel.stream_stream(
            prefix + "Forward", response_deserializer=pb.ForwardResponse.FromString
        )


def shard_handlers(
    *,
    describe: Callable[[pb.DescribeRequest, Any], Awaitable[pb.DescribeResponse]],
    assign: Callable[[pb.AssignRequest, Any], Awaitable[pb.AssignResponse]],
    fetch_files: Callable[[pb.FetchFilesRequest, Any], Any],
    session: StreamHandler,
    forward: StreamHandler,
) -> grpc.GenericRpcHandler:
    """The server's side: `session` writes framed SessionResponses, `forward` reads framed MicroBatches."""
    handlers = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            cast(Any, describe),
            request_deserializer=pb.DescribeRequest.FromString,
            response_serializer=pb.DescribeResponse.SerializeToString,
        ),
        "Assign": grpc.unary_unary_rpc_method_handler(
            cast(Any, assign),
            request_deserializer=pb.AssignRequest.FromString,
            response_serializer=pb.AssignResponse.SerializeToString,
        ),
        "FetchFiles": grpc.unary_stream_rpc_method_handler(
            fetch_files,
            request_deserializer=pb.FetchFilesRequest.FromString,
            response_serializer=pb.FileChunk.SerializeToString,
        ),
        "Session": grpc.stream_stream_rpc_method_handler(
            cast(Any, session), request_deserializer=pb.SessionRequest.FromString
        ),
        "Forward": grpc.stream_stream_rpc_method_handler(
            cast(Any, forward), response_serializer=pb.ForwardResponse.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE_NAME, cast(Any, handlers))

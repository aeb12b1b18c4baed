"""How a server ends a call: with our error, also as `google.rpc.Status` for clients that know nothing of ours.

Servers only: it needs the [service] extra, and the bare SDK has neither need nor the packages for it.

The trailing metadata entry `grpc-status-details-bin` is where gRPC clients of every language look for it (`from_call`
of grpcio-status, `StatusProto.fromThrowable` in Java, `status.Details` in Go):
    ErrorInfo  reason: our error's class name, such as "Overloaded"; domain: "stagecoach"; metadata: field, limit and
               value, those that there are
    RetryInfo  where sending the same again can help and we can say when
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from stagecoach.errors import DETAIL_METADATA_KEY, StagecoachError, to_detail
from stagecoach.v1.model_pb2 import ErrorDetail

STATUS_METADATA_KEY = "grpc-status-details-bin"
DOMAIN = "stagecoach"


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: StagecoachError) -> NoReturn:
    """Ends a call on the server's side with the error's status and facts: ours, and Google's for any other client."""
    detail = to_detail(error)
    metadata = (
        (DETAIL_METADATA_KEY, detail.SerializeToString()),
        (STATUS_METADATA_KEY, rich_status(detail, error.code).SerializeToString()),
    )
    try:
        await context.abort(error.code, detail.message, trailing_metadata=metadata)
    except grpc.aio.InternalError as failure:
        # The call was over a moment before, by its deadline or its caller, and its task is about to be cancelled.
        raise asyncio.CancelledError from failure
    raise AssertionError("abort returned")


def rich_status(detail: ErrorDetail, code: grpc.StatusCode) -> Status:
    """The same facts as `detail`, whose texts have been cut. A client checks code and message against the call's."""
    number: int = code.value[0]
    status = Status(code=number, message=detail.message)
    facts = {"field": detail.field, "limit": detail.limit, "value": detail.value}
    info = ErrorInfo(reason=detail.kind, domain=DOMAIN, metadata={name: fact for name, fact in facts.items() if fact})
    status.details.add().Pack(info)
    if detail.retryable and detail.retry_after_s > 0:
        delay = Duration()
        delay.FromMilliseconds(round(1000 * detail.retry_after_s))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status

"""Errors as `google.rpc.Status`, for clients that know nothing of ours. Servers only: it needs the [service] extra.

The trailing metadata entry `grpc-status-details-bin` is where gRPC clients of every language look for it (`from_call`
of grpcio-status, `StatusProto.fromThrowable` in Java, `status.Details` in Go):
    ErrorInfo  reason: our error's class name, such as "Overloaded"; domain: "stagecoach"; metadata: field, limit and
               value, those that there are
    RetryInfo  where sending the same again can help and we can say when
"""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from stagecoach.v1.model_pb2 import ErrorDetail

STATUS_METADATA_KEY = "grpc-status-details-bin"
DOMAIN = "stagecoach"


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

"""How an error travels over gRPC: as a `google.rpc.Status`, so that a caller catches the class that the server raised.

It is in the trailing metadata, where gRPC clients of every language look for it (`from_call` of grpcio-status,
`StatusProto.fromThrowable` in Java, `status.Details` in Go). Its details are

    ErrorInfo  reason: the error's class name, such as "Overloaded"; domain: "stagecoach"; metadata: of field, limit,
               value and addresses ("HOST:PORT,HOST:PORT"), those that there are
    RetryInfo  where sending the same again can help and we can say when
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any, NoReturn

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from stagecoach.errors import types
from stagecoach.errors.types import InternalError, StagecoachError

STATUS_METADATA_KEY = "grpc-status-details-bin"
DOMAIN = "stagecoach"

MAX_MESSAGE_LENGTH = 300  # characters
# In UTF-8. A status travels in HTTP/2 metadata, of which gRPC takes 8 KiB: the message twice (with three characters for
# a byte, and in base64), the facts once.
MAX_MESSAGE_BYTES = 600
MAX_FACT_BYTES = 256
MAX_ADDRESSES = 2  # both ends of a link
# Of a status that we read. We send two.
MAX_DETAILS = 4
MAX_DETAIL_BYTES = 8192
_FACTS = ("field", "limit", "value", "addresses")
# The longest wait that a peer's hint can ask for.
MAX_RETRY_AFTER_S = 86_400.0

_KINDS: dict[str, type[StagecoachError]] = {
    name: kind for name, kind in vars(types).items() if isinstance(kind, type) and issubclass(kind, StagecoachError)
}


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: StagecoachError) -> NoReturn:
    """Ends a call on the server's side with the error."""
    try:
        await context.abort(error.code, _text(error), trailing_metadata=to_trailing_metadata(error))
    except grpc.aio.InternalError as failure:
        # The call was over a moment before, by its deadline or its caller, and its task is about to be cancelled.
        raise asyncio.CancelledError from failure
    raise AssertionError("abort returned")


def to_trailing_metadata(error: StagecoachError) -> tuple[tuple[str, bytes], ...]:
    """What a call that ends with the error has in its trailing metadata."""
    return ((STATUS_METADATA_KEY, to_status(error).SerializeToString()),)


def from_trailing_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> StagecoachError | None:
    """The error in a call's trailing metadata; None where there is none that can be read."""
    for key, value in metadata or ():
        if key == STATUS_METADATA_KEY and isinstance(value, bytes):
            try:
                return from_status(Status.FromString(value))
            except DecodeError:  # whatever a broken peer put there, the call's own code and text still hold
                return None
    return None


def to_status(error: StagecoachError) -> Status:
    """The error as a message. What a caller sent may be quoted in it, so its texts are cut, and made to be UTF-8."""
    code: int = error.code.value[0]
    status = Status(code=code, message=_text(error))
    addresses = ",".join(error.addresses[:MAX_ADDRESSES])
    facts = {"field": error.field, "limit": error.limit, "value": error.value, "addresses": addresses}
    metadata = {name: _within(fact, MAX_FACT_BYTES) for name, fact in facts.items() if fact}
    status.details.add().Pack(ErrorInfo(reason=type(error).__name__, domain=DOMAIN, metadata=metadata))
    delay_s = _sane_wait(error.retry_after_s)
    if error.retryable and delay_s:
        delay = Duration()
        delay.FromMilliseconds(round(1000 * delay_s))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


def from_status(status: Status) -> StagecoachError | None:
    """The error that a peer of ours described; None for a status from anyone else, such as a proxy, and a broken one.

    A class that this version does not have becomes an InternalError that names it. What a peer sends is bounded as what
    we send is, and without control characters: it goes on into logs, statuses and terminals.
    """
    info, retry = ErrorInfo(), RetryInfo()
    try:
        for detail in status.details[:MAX_DETAILS]:
            if len(detail.value) > MAX_DETAIL_BYTES:
                return None
            detail.Unpack(info)  # only where it is one
            detail.Unpack(retry)
    except DecodeError:
        return None
    if info.domain != DOMAIN:
        return None
    message = clean(status.message, MAX_MESSAGE_BYTES)
    facts = {name: clean(info.metadata[name], MAX_FACT_BYTES) for name in _FACTS if name in info.metadata}
    named = facts.get("addresses", "")
    addresses = named.split(",")[:MAX_ADDRESSES] if named else ()
    kind = _KINDS.get(info.reason)
    if kind is None:
        reason = clean(info.reason, MAX_FACT_BYTES)
        return InternalError(f"{reason}: {message}", field=facts.get("field", ""), addresses=addresses)
    return kind(
        message,
        field=facts.get("field", ""),
        limit=facts.get("limit", ""),
        value=facts.get("value", ""),
        retry_after_s=_sane_wait(retry.retry_delay.seconds + 1e-9 * retry.retry_delay.nanos),
        addresses=addresses,
    )


def clean(text: str, max_bytes: int) -> str:
    """A text that may be somebody else's, cut and on one line, without what would move a terminal's cursor."""
    # Cut first, so that the rest costs no more than what is kept; a character has a byte at least.
    kept = (each if each.isprintable() else " " if each.isspace() else "\ufffd" for each in text[:max_bytes])
    return _within("".join(kept), max_bytes)


def _text(error: StagecoachError) -> str:
    """The error's text, so that it can travel."""
    text, length = error.message, len(error.message)
    if length > MAX_MESSAGE_LENGTH:
        text = f"{text[:MAX_MESSAGE_LENGTH]}… ({length} characters)"
    return clean(text, MAX_MESSAGE_BYTES)


def _within(text: str, max_bytes: int) -> str:
    """The text as UTF-8 can say it, cut to so many bytes of it."""
    data = text.encode("utf-8", "replace")
    return data[:max_bytes].decode("utf-8", "ignore")


def _sane_wait(seconds: float) -> float:
    """A hint that somebody can wait for: what is no number, or less than none, is no hint."""
    return min(seconds, MAX_RETRY_AFTER_S) if math.isfinite(seconds) and seconds > 0 else 0.0

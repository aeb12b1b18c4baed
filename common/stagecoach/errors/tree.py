"""One tree of errors for the SDK, the router and the shards.

An error carries its facts (the field, the limit, the value), the gRPC code it travels as, and whether sending the same
request again can help. `to_detail` and `from_detail` take it over the wire and back, so that a caller catches the
class that the server raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import grpc

from stagecoach.errors import handshake
from stagecoach.v1.model_pb2 import ErrorDetail

# The trailing metadata entry that holds a serialised ErrorDetail.
DETAIL_METADATA_KEY = "stagecoach-error-bin"
# Characters.
MAX_MESSAGE_LENGTH = 300
# UTF-8. A status travels in HTTP/2 metadata, of which gRPC takes 8 KiB: the message three times (once with three
# characters for a byte, twice in base64), the facts twice.
MAX_MESSAGE_BYTES = 600
MAX_FACT_BYTES = 256
# Both ends of a link.
MAX_ADDRESSES = 2
# Calls beyond a server's limit are refused by gRPC itself, which says so and no more; the next one may find room.
CALL_LIMIT_DETAILS = "Concurrent RPC limit exceeded"
CALL_LIMIT_RETRY_AFTER_S = 1.0
# The longest wait that a peer's hint can ask for.
MAX_RETRY_AFTER_S = 86_400.0


class StagecoachError(Exception):
    """The root. `field` names the request field at fault, `limit` what was passed and `value` by what ("" if none).

    `addresses`: HOST:PORT of the processes that it is about, where it names any. Whom to avoid is told by these, never
    by the text.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        limit: object = "",
        value: object = "",
        retry_after_s: float = 0.0,
        addresses: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.limit = str(limit)[:200]
        self.value = str(value)[:200]
        self.retry_after_s = retry_after_s
        self.addresses = tuple(addresses)


class InvalidArgument(StagecoachError):
    """A field of the request is wrong whatever the state of the server."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class OutOfRange(StagecoachError):
    """A field is well-formed, and past what this model or cluster can take."""

    code = grpc.StatusCode.OUT_OF_RANGE


class NotFound(StagecoachError):
    """No such model."""

    code = grpc.StatusCode.NOT_FOUND


class Unauthenticated(StagecoachError):
    """The server wants an API key, and does not know the one that came, if any did."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(StagecoachError):
    """The caller is known, and may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Overloaded(StagecoachError):
    """The server is full right now. Nothing was begun; `retry_after_s` is a hint."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class RateLimited(Overloaded):
    """The caller has used up what its API key allows for now, whatever room the server has."""


class KVCacheFull(Overloaded):
    """There are not enough K/V blocks."""

    def __init__(self, message: str = "", *, needed_blocks: int = 0, free_blocks: int = 0, **facts: object) -> None:
        text = message or f"K/V cache is full: {needed_blocks} blocks needed, {free_blocks} free"
        super().__init__(text, limit=facts.get("limit", free_blocks), value=facts.get("value", needed_blocks))
        self.needed_blocks = needed_blocks
        self.free_blocks = free_blocks


class FailedPrecondition(StagecoachError):
    """Two parties do not fit together; someone has to change the set-up first."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ModelMismatch(FailedPrecondition):
    """Protocol, model fingerprint, layer range or dtype differ from what the other side expects."""


class TopologyError(FailedPrecondition):
    """The shards do not cover the model's layers exactly once."""


class CheckpointError(FailedPrecondition):
    """A checkpoint cannot be served: a tensor is missing, mis-shaped or truncated, or the configuration unsupported."""


class StaleEpoch(StagecoachError):
    """The sender's incarnation of the pipeline is over."""

    code = grpc.StatusCode.ABORTED


class ShardFault(StagecoachError):
    """A stage failed while it computed."""

    code = grpc.StatusCode.ABORTED
    retryable = True


class Unavailable(StagecoachError):
    """The server cannot be reached, or has no working pipeline now."""

    code = grpc.StatusCode.UNAVAILABLE
    retryable = True


class HandshakeFailed(Unavailable):
    """The two sides do not agree on TLS, or do not trust each other: files or options have to change first."""

    retryable = False


class DeadlineExceeded(StagecoachError):
    """The call's deadline passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(StagecoachError):
    """The caller went away, or cancelled."""

    code = grpc.StatusCode.CANCELLED


class Unimplemented(StagecoachError):
    """The server does not know this call; it is likely of another version."""

    code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(StagecoachError):
    """A bug on the server's side."""

    code = grpc.StatusCode.INTERNAL


class ConfigError(StagecoachError):
    """A process was started with settings that cannot work."""

    code = grpc.StatusCode.INVALID_ARGUMENT


_KINDS: dict[str, type[StagecoachError]] = {
    kind.__name__: kind
    for kind in (
        InvalidArgument,
        OutOfRange,
        NotFound,
        Unauthenticated,
        PermissionDenied,
        Overloaded,
        RateLimited,
        KVCacheFull,
        FailedPrecondition,
        ModelMismatch,
        TopologyError,
        CheckpointError,
        StaleEpoch,
        ShardFault,
        Unavailable,
        HandshakeFailed,
        DeadlineExceeded,
        Cancelled,
        Unimplemented,
        InternalError,
        ConfigError,
    )
}

# What a bare gRPC status means, for a peer that sent no detail (a proxy, another version).
_BY_CODE: dict[grpc.StatusCode, type[StagecoachError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: ShardFault,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: InternalError,
}


def to_detail(error: StagecoachError) -> ErrorDetail:
    """The error as a message. What a caller sent may be quoted in it, so its texts are cut, and made to be UTF-8."""
    return ErrorDetail(
        kind=type(error).__name__,
        message=_within(_cut(error.message), MAX_MESSAGE_BYTES),
        field=_within(error.field, MAX_FACT_BYTES),
        limit=_within(error.limit, MAX_FACT_BYTES),
        value=_within(error.value, MAX_FACT_BYTES),
        retryable=error.retryable,
        retry_after_s=_sane_wait(error.retry_after_s),
        addresses=[_within(address, MAX_FACT_BYTES) for address in error.addresses[:MAX_ADDRESSES]],
    )


def from_detail(detail: ErrorDetail) -> StagecoachError:
    """The error a message describes; an unknown kind becomes an InternalError that names it."""
    kind = _KINDS.get(detail.kind)
    if kind is None:
        return InternalError(f"{detail.kind}: {detail.message}", field=detail.field, addresses=detail.addresses)
    error = kind(detail.message)
    error.field, error.limit, error.value = detail.field, detail.limit, detail.value
    error.retry_after_s = _sane_wait(detail.retry_after_s)
    error.addresses = tuple(detail.addresses)
    return error


def from_trailing_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> StagecoachError | None:
    """The error in a call's trailing metadata; None where there is none that can be read."""
    for key, value in metadata or ():
        if key == DETAIL_METADATA_KEY and isinstance(value, bytes):
            try:
                return from_detail(ErrorDetail.FromString(value))
            except Exception:  # whatever a broken peer put there, the call's status still holds
                return None
    return None


def from_rpc_error(error: grpc.RpcError, peer: str) -> StagecoachError:
    """The error behind a failed call to `peer` (HOST:PORT). It is about the peer, unless that says who else it is."""
    detailed = from_trailing_metadata(getattr(error, "trailing_metadata", lambda: ())())
    if detailed is not None:
        detailed.addresses = detailed.addresses or (peer,)
        return detailed
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = error.details() if hasattr(error, "details") else str(error)
    kind = _BY_CODE.get(code, StagecoachError)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (details or ""):
        kind = OutOfRange  # gRPC's own limit on a message's size: sending it again cannot help
    if "metadata size exceeds" in (details or ""):
        kind = InternalError  # the status itself was lost on its way
    if kind is Unavailable and details:
        if (reason := handshake.explain(details)) is not None:
            return HandshakeFailed(f"{peer}: {reason}", addresses=[peer])
        details += handshake.hint(details)
    is_call_limit = kind is Overloaded and CALL_LIMIT_DETAILS in (details or "")
    retry_after_s = CALL_LIMIT_RETRY_AFTER_S if is_call_limit else 0.0
    return kind(f"{peer}: {details or code.name}", retry_after_s=retry_after_s, addresses=[peer])


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]}… ({len(text)} characters)"


def _within(text: str, max_bytes: int) -> str:
    """The text as UTF-8 can say it, cut to so many bytes of it."""
    data = text.encode("utf-8", "replace")
    return data[:max_bytes].decode("utf-8", "ignore")


def _sane_wait(seconds: float) -> float:
    """A hint that somebody can wait for: not a number, or less than none, is none."""
    return min(seconds, MAX_RETRY_AFTER_S) if math.isfinite(seconds) and seconds > 0 else 0.0

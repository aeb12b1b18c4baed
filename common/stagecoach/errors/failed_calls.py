"""What it means that a call failed: the error that the server sent or, where gRPC itself ended the call, one of ours.

gRPC says why it ended a call in words only. So a few of them are looked for here, and nowhere else: those that tell
whether a retry can help, whether the call had reached the server, and what an operator has to change. What is not
recognised stays what its code says.
"""

from __future__ import annotations

import re

import grpc

from stagecoach.errors import types
from stagecoach.errors.status import clean, from_trailing_metadata

# What a bare gRPC status means, from a peer that sent no details (gRPC itself, a proxy, another version).
_BY_CODE: dict[grpc.StatusCode, type[types.StagecoachError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: types.InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: types.OutOfRange,
    grpc.StatusCode.NOT_FOUND: types.NotFound,
    grpc.StatusCode.UNAUTHENTICATED: types.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: types.PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: types.Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: types.FailedPrecondition,
    grpc.StatusCode.ABORTED: types.ShardFault,
    grpc.StatusCode.UNAVAILABLE: types.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: types.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: types.Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: types.Unimplemented,
    grpc.StatusCode.INTERNAL: types.InternalError,
}

# Calls beyond a server's limit are refused by gRPC, which cannot say when to come back; the next one may find room.
_CALL_LIMIT = "Concurrent RPC limit exceeded"
CALL_LIMIT_RETRY_AFTER_S = 1.0
# So gRPC itself ends a call that nobody has looked at, where too many wait for that or the server stops.
_ENDED_UNSEEN = "CANCELLED"
# gRPC's own words about a connection that failed name every address that was tried, and why.
MAX_DETAILS_BYTES = 1000
_MESSAGE_TOO_LARGE = "larger than max"
_STATUS_LOST = "metadata size exceeds"

# Followed by what OpenSSL says of the certificate.
_VERIFY_FAILED = re.compile(r"CERTIFICATE_VERIFY_FAILED(?:: (?P<reason>[a-z][a-z -]*))?")
_OTHER_NAME = re.compile(r"Hostname Verification Check failed|is not in peer certificate")
_CLOSED_AT_ONCE = re.compile(r"failed to connect.*(Socket closed|Connection reset)", re.DOTALL)

# What gRPC says of a call whose connection ended under it, and of one that never had a connection.
_CONNECTION_ENDED = re.compile(r"Socket closed|Connection reset|Broken pipe|GOAWAY|Cancelling all calls|ping timeout")
_NOT_CONNECTED = re.compile(r"failed to connect", re.IGNORECASE)


def from_rpc_error(error: grpc.RpcError, peer: str, *, names_peer: bool = False) -> types.StagecoachError:
    """The error behind a failed call to `peer` (HOST:PORT). It is about the peer, unless that says who else it is.

    `names_peer`: its text begins with the peer also where the peer wrote it, who need not say who it is.
    """
    sent = _sent_error(error)
    if sent is not None:
        sent.addresses = sent.addresses or (peer,)
        if names_peer:
            sent.message = f"{peer}: {sent.message}"
            sent.args = (sent.message,)
        return sent
    code, details = _code_and_details(error)
    kind, retry_after_s = _BY_CODE.get(code, types.StagecoachError), 0.0
    if _STATUS_LOST in details:
        kind = types.InternalError
    elif kind is types.Overloaded and _MESSAGE_TOO_LARGE in details:
        kind = types.OutOfRange  # sending it again cannot help
    elif kind is types.Overloaded and _CALL_LIMIT in details:
        retry_after_s = CALL_LIMIT_RETRY_AFTER_S
    elif kind is types.Cancelled and details == _ENDED_UNSEEN:
        kind, retry_after_s = types.Unavailable, CALL_LIMIT_RETRY_AFTER_S
        details = "it has more calls than it can look at, or is stopping"
    elif kind is types.Unavailable and (reason := why_no_handshake(details)):
        kind, details = types.HandshakeFailed, reason
    elif kind is types.Unavailable and _CLOSED_AT_ONCE.search(details):
        # The accepting side closes the connection on whoever it does not like, and says why in its own log only.
        details += " (it hung up at once: perhaps it speaks TLS, and we do not, or it wants another certificate of us)"
    # The words may be the peer's, as anything else is that comes from it.
    return kind(
        f"{peer}: {clean(details, MAX_DETAILS_BYTES) or code.name}", retry_after_s=retry_after_s, addresses=[peer]
    )


def connection_ended(error: grpc.RpcError) -> bool:
    """Whether it was gRPC that ended a call, because of its connection, after the call had reached the server.

    In doubt it had not. Then the call is tried again, only for a shorter time.
    """
    code, details = _code_and_details(error)
    return (
        code is grpc.StatusCode.UNAVAILABLE
        and _CONNECTION_ENDED.search(details) is not None
        and _NOT_CONNECTED.search(details) is None
        and _sent_error(error) is None
    )


def _sent_error(error: grpc.RpcError) -> types.StagecoachError | None:
    return from_trailing_metadata(getattr(error, "trailing_metadata", lambda: ())())


def _code_and_details(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    return code, (error.details() if hasattr(error, "details") else str(error)) or ""


def why_no_handshake(details: str) -> str:
    """What is wrong between the two sides, if the `details` of a failed call say so for sure; "" if they do not."""
    if (match := _VERIFY_FAILED.search(details)) is not None:
        reason = match["reason"] or "verification failed"
        return f"its certificate is not one to trust by our CA (tls-ca): {reason.strip()}"
    if _OTHER_NAME.search(details) is not None:
        return "its certificate is for another name than the one that we want"
    if "WRONG_VERSION_NUMBER" in details:
        return "it does not speak TLS"
    return ""

"""One tree of errors for the SDK, the router and the shards.

An error carries its facts in fields, the gRPC code it travels as (see status.py), and whether sending the same request
again can help.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc


class StagecoachError(Exception):
    """The root of the tree.

    `field` names the request field at fault, `value` what it was and `limit` what it may be ("" for none).
    `addresses` are HOST:PORT of the processes that the error is about: whom to avoid is told by these, not by the text.
    `retryable` says whether sending the same again can help, and `retry_after_s` when (0: not known).
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
    """There is no such model."""

    code = grpc.StatusCode.NOT_FOUND


class Unauthenticated(StagecoachError):
    """The server wants an API key, and does not know the one that came, if any did."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(StagecoachError):
    """The caller is known, and may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Overloaded(StagecoachError):
    """The server is full right now. Nothing was begun."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class RateLimited(Overloaded):
    """The caller has used up what its API key allows for now, whatever room the server has."""


class KVCacheFull(Overloaded):
    """There are not enough K/V blocks: `value` are needed, and `limit` are free."""

    @classmethod
    def of_blocks(cls, *, needed: int, free: int) -> KVCacheFull:
        return cls(f"K/V cache is full: {needed} blocks needed, {free} free", limit=free, value=needed)


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


class ShardStopping(Unavailable):
    """A shard ends the lease as it was told to stop: nothing that it computed is to blame."""


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

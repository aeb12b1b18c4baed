"""Errors travel as google.rpc.Status, which any gRPC client can read, and fit the metadata of a call."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from stagecoach import errors
from stagecoach.errors.status import DOMAIN, STATUS_METADATA_KEY, abort, from_status, to_status

# What gRPC takes of metadata in all, less what its own headers need.
MAX_METADATA_BYTES = 8192 - 512


class Context:
    """The end of a call."""

    async def abort(self, code, details, trailing_metadata):
        self.ended = code, details, dict(trailing_metadata)
        raise ConnectionAbortedError


async def ended_with(error):
    context = Context()
    with pytest.raises(ConnectionAbortedError):
        await abort(context, error)
    return context.ended


def details_of(error):
    status = to_status(error)
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    return status, info, retry if len(status.details) > 1 and status.details[1].Unpack(retry) else None


def test_kind_and_facts_are_in_the_error_info():
    status, info, retry = details_of(errors.OutOfRange("too long", field="prompt", limit=10, value=11))
    assert (status.code, status.message) == (grpc.StatusCode.OUT_OF_RANGE.value[0], "too long")
    assert (info.reason, info.domain) == ("OutOfRange", DOMAIN)
    assert dict(info.metadata) == {"field": "prompt", "limit": "10", "value": "11"}
    assert retry is None


def test_facts_that_there_are_not_are_left_out():
    _, info, _ = details_of(errors.Unavailable("no pipeline"))
    assert dict(info.metadata) == {}


def test_when_to_come_back_is_in_the_retry_info():
    _, _, retry = details_of(errors.Overloaded("full", retry_after_s=1.25))
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 250_000_000)
    assert details_of(errors.InvalidArgument("no", retry_after_s=1.0))[2] is None


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_wait_that_is_no_time_is_no_hint(seconds):
    assert details_of(errors.Overloaded("full", retry_after_s=seconds))[2] is None


@pytest.mark.parametrize("character", ["x", "\u00e4", "\U0001f600", "\ud800", "\0"])
async def test_the_worst_error_still_fits_the_metadata_of_a_call(character):
    text = character * 5000
    code, message, metadata = await ended_with(
        errors.Overloaded(text, field=text, limit=text, value=text, retry_after_s=1e300, addresses=[text] * 3)
    )
    # As they travel: percent-encoded at the worst, and in base64.
    size = 3 * len(message.encode()) + sum(len(key) + -(-len(value) // 3) * 4 for key, value in metadata.items())
    assert size < MAX_METADATA_BYTES
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert set(metadata) == {STATUS_METADATA_KEY}
    assert type(errors.from_trailing_metadata(metadata.items())) is errors.Overloaded


def test_metadata_that_cannot_be_read_is_no_error_of_ours():
    assert errors.from_trailing_metadata(None) is None
    assert errors.from_trailing_metadata([("other", "x"), (STATUS_METADATA_KEY, b"\xff\xff")]) is None
    assert type(errors.from_trailing_metadata(errors.to_trailing_metadata(errors.NotFound("x")))) is errors.NotFound


def test_details_from_somebody_else_are_no_error_of_ours():
    status = Status(code=14, message="no healthy upstream")
    assert from_status(status) is None
    status.details.add().Pack(ErrorInfo(reason="Overloaded", domain="proxy.example"))
    status.details.add().Pack(RetryInfo())
    assert from_status(status) is None


@pytest.mark.parametrize(("seconds", "expected"), [(-1, 0.0), (2**62, 86_400.0)])
def test_a_hint_that_nobody_can_wait_for_is_bounded(seconds, expected):
    status = to_status(errors.Overloaded("full"))
    status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=seconds)))
    assert from_status(status).retry_after_s == expected


def test_details_that_are_not_what_they_say_are_no_error_of_ours():
    status = to_status(errors.Overloaded("full"))
    status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff")
    assert errors.from_trailing_metadata([(STATUS_METADATA_KEY, status.SerializeToString())]) is None


def test_what_a_peer_sends_is_bounded_and_on_one_line():
    info = ErrorInfo(reason="ShardFault", domain="stagecoach")
    info.metadata.update({"field": "f" * 5000, "addresses": ",".join(["1.2.3.4:5"] * 200), "other": "x"})
    status = Status(message="\x1b[2Jgone\n2026-11-27 INFO forged " + "m" * 100_000)
    status.details.add().Pack(info)
    error = from_status(status)
    assert isinstance(error, errors.ShardFault)
    assert len(error.message.encode()) <= 600
    assert error.message.startswith("\ufffd[2Jgone 2026-11-27 INFO forged m")
    assert len(error.field) == 256
    assert error.addresses == ("1.2.3.4:5",) * 2


def test_of_a_million_details_only_the_first_are_looked_at():
    status = Status(message="many")
    for _ in range(10):
        status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"")
    status.details.add().Pack(ErrorInfo(reason="ShardFault", domain="stagecoach"))
    assert from_status(status) is None
    large = Status(message="large")
    large.details.add().Pack(ErrorInfo(reason="x" * 10_000, domain="stagecoach"))
    assert from_status(large) is None

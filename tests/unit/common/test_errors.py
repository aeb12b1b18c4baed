"""Errors keep their class and their facts over the wire."""

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from stagecoach import errors
from stagecoach.errors.status import DOMAIN, STATUS_METADATA_KEY, from_status, to_status


class FailedCall(grpc.RpcError):
    def __init__(self, code, details="it broke", metadata=()):
        self._facts = code, details, metadata

    def code(self):
        return self._facts[0]

    def details(self):
        return self._facts[1]

    def trailing_metadata(self):
        return self._facts[2]


# Those that travel: what a component adds for itself alone does not.
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.StagecoachError) and kind is not errors.StagecoachError
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_what_it_was(kind):
    error = kind("why", field="top_p", limit="(0, 1]", value="7", retry_after_s=1.5, addresses=["h:1", "h:2"])
    again = errors.from_trailing_metadata(errors.to_trailing_metadata(error))
    assert type(again) is kind
    assert (again.field, again.limit, again.value) == ("top_p", "(0, 1]", "7")
    assert again.retry_after_s == (1.5 if kind.retryable else 0.0)
    assert again.addresses == ("h:1", "h:2")
    assert str(again) == "why"


def test_a_failed_call_is_about_its_peer_unless_that_names_another():
    bare = FailedCall(grpc.StatusCode.UNAVAILABLE)
    assert errors.from_rpc_error(bare, "h:1").addresses == ("h:1",)
    for named, expected in (((), ("h:1",)), (("h:2",), ("h:2",))):
        sent = errors.to_trailing_metadata(errors.Unavailable("why", addresses=named))
        call = FailedCall(grpc.StatusCode.UNAVAILABLE, metadata=sent)
        assert errors.from_rpc_error(call, "h:1").addresses == expected


def test_an_error_of_a_later_version_is_still_an_error():
    status = Status(message="no")
    status.details.add().Pack(ErrorInfo(reason="FromTheFuture", domain=DOMAIN))
    error = from_status(status)
    assert isinstance(error, errors.InternalError)
    assert "FromTheFuture" in str(error)


def test_the_detail_in_the_metadata_goes_before_the_status():
    sent = errors.to_trailing_metadata(errors.OutOfRange("too long", field="prompt", limit=10, value=11))
    error = errors.from_rpc_error(FailedCall(grpc.StatusCode.UNKNOWN, metadata=sent), "h:1")
    assert type(error) is errors.OutOfRange
    assert (error.field, error.limit, error.value) == ("prompt", "10", "11")


def test_a_status_without_detail_or_with_a_broken_one_still_says_what_and_where():
    for metadata in ((), ((STATUS_METADATA_KEY, b"\xff\xff"),)):
        error = errors.from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE, metadata=metadata), "h:1")
        assert type(error) is errors.Unavailable
        assert str(error) == "h:1: it broke"


def test_a_full_cache_says_how_full():
    error = errors.KVCacheFull.of_blocks(needed=9, free=4)
    assert str(error) == "K/V cache is full: 9 blocks needed, 4 free"
    assert error.retryable


def test_a_message_that_is_too_large_is_not_worth_another_try():
    call = FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "Sent message larger than max (9 vs. 4)")
    error = errors.from_rpc_error(call, "h:1")
    assert type(error) is errors.OutOfRange
    assert not error.retryable


def test_a_long_message_is_cut_so_that_the_status_arrives():
    status = to_status(errors.NotFound("x" * 20_000, field="model", value="y" * 20_000))
    assert status.ByteSize() < 1500
    assert "20000 characters" in status.message
    assert type(from_status(status)) is errors.NotFound

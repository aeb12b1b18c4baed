"""gRPC's words about connections that did not come about, as the versions that we support have them."""

import grpc
import pytest

from stagecoach import errors
from stagecoach.errors.failed_calls import why_no_handshake

PREFIX = "failed to connect to all addresses; last error: "
OPENSSL = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
ELDER = "ipv4:127.0.0.1:1: Ssl handshake failed: SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"


class Failure(grpc.RpcError):
    def __init__(self, details, code=grpc.StatusCode.UNAVAILABLE):
        self._details = details
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return self._details


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        (f"{OPENSSL}CERTIFICATE_VERIFY_FAILED: certificate has expired: OK", "certificate has expired"),
        (f"{OPENSSL}CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate: OK", "local issuer"),
        (f"{ELDER}CERTIFICATE_VERIFY_FAILED", "verification failed"),
        ("Custom verification check failed with error: UNAUTHENTICATED: Hostname Verification Check failed.", "name"),
        ("Peer name mine is not in peer certificate", "another name"),
        (f"{OPENSSL}WRONG_VERSION_NUMBER: Invalid certificate verification context: OK", "does not speak TLS"),
    ],
)
def test_what_a_retry_cannot_help_is_said_and_not_retried(details, reason):
    error = errors.from_rpc_error(Failure(PREFIX + details), "gpu-1:50051")
    assert type(error) is errors.HandshakeFailed
    assert not error.retryable
    assert error.message.startswith("gpu-1:50051: it")
    assert reason in error.message


@pytest.mark.parametrize("how", ["UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed", "recvmsg:Connection reset by peer"])
def test_who_hangs_up_at_once_may_want_tls_or_be_about_to_come_back(how):
    error = errors.from_rpc_error(Failure(PREFIX + how), "gpu-1:50051")
    assert type(error) is errors.Unavailable
    assert error.retryable
    assert how in error.message
    assert "perhaps it speaks TLS" in error.message


def test_the_words_of_a_peer_are_cut_and_cannot_move_a_cursor():
    error = errors.from_rpc_error(Failure("\x1b[2J\nforged" + 7000 * "ü"), "gpu-1:50051")
    assert error.message.isprintable()
    assert len(error.message) < 1000


@pytest.mark.parametrize("details", ["", "Connection refused", "Socket closed", "the shard is loading its layers"])
def test_other_failures_stay_what_they_are(details):
    assert why_no_handshake(details) == ""
    error = errors.from_rpc_error(Failure(details), "gpu-1:50051")
    assert (type(error), error.message) == (errors.Unavailable, f"gpu-1:50051: {details or 'UNAVAILABLE'}")


def test_a_call_that_grpc_ended_before_anybody_looked_at_it_is_made_again():
    """That is no word of anybody who wanted to cancel it."""
    error = errors.from_rpc_error(Failure("CANCELLED", grpc.StatusCode.CANCELLED), "router:50050")
    assert type(error) is errors.Unavailable
    assert error.retry_after_s > 0


def test_a_call_that_somebody_cancelled_stays_cancelled():
    error = errors.from_rpc_error(Failure("the request was cancelled", grpc.StatusCode.CANCELLED), "router:50050")
    assert type(error) is errors.Cancelled

"""Addresses are checked and split, and the options of channels and servers fit together."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument
from stagecoach.rpc.addresses import check_address, split_address
from stagecoach.rpc.channel import (
    MAX_PUBLIC_MESSAGE_BYTES,
    MAX_SHARD_MESSAGE_BYTES,
    channel_options,
    peer_limits,
    public_limits,
    server_options,
)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50050",
        "localhost:1",
        "shard-0.shards.ns.svc.cluster.local:65535",
        "shard_1:80",
        "[::1]:50051",
        "a.:9",
    ],
)
def test_good_addresses_pass_as_they_are(address: str) -> None:
    assert check_address(address, "target") == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        ":50050",
        "host:port",
        "host:0",
        "host:65536",
        "host:1e3",
        "host:-1",
        "host:50050 ",
        "host:٣",
        "ho st:1",
        "-host:1",
        "host/path:1",
        "::1:50050",
        "[::1]",
        "[::g]:1",
        "[127.0.0.1]:1",
        "256.0.0.1:1",
        "1.2.3:1",
        "http://host:1",
        "dns:///host:1",
        "unix:/tmp/x",
        "a" * 254 + ":1",
        "host:1\n",
    ],
)
def test_bad_addresses_are_named_with_their_field(address: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_address(address, "shards")
    assert caught.value.field == "shards"
    assert caught.value.limit


def test_something_else_than_a_string_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        check_address(50050, "target")  # type: ignore[arg-type]


def test_a_listener_may_leave_the_port_open() -> None:
    assert check_address("0.0.0.0:0", "listen", listening=True) == "0.0.0.0:0"


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_ip_address_passes_and_comes_apart_again(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    assert split_address(check_address(f"{host}:{port}", "target"), "target") == (host, port)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_typed_error(text: str) -> None:
    try:
        host, port = split_address(check_address(text, "target"), "target")
    except InvalidArgument:
        return
    assert text == f"{host}:{port}" or text.startswith(f"{host}:0")


@pytest.mark.parametrize("limit", [MAX_PUBLIC_MESSAGE_BYTES, MAX_SHARD_MESSAGE_BYTES])
def test_messages_are_limited_both_ways(limit: int) -> None:
    for options in (dict(channel_options(limit)), dict(server_options(limit))):
        assert options["grpc.max_receive_message_length"] == limit
        assert options["grpc.max_send_message_length"] == limit


def test_a_server_tolerates_its_callers_keepalive() -> None:
    client, server = dict(channel_options(1)), dict(server_options(1))
    assert server["grpc.http2.min_recv_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]


def test_the_connect_timeout_is_the_callers() -> None:
    assert dict(channel_options(1, connect_timeout_s=0.25))["grpc.min_reconnect_backoff_ms"] == 250


def test_strangers_get_limits_that_a_shard_and_its_router_do_not() -> None:
    limits = dict(public_limits(7))
    assert limits["grpc.max_allowed_incoming_connections"] == 7
    assert limits["grpc.server.max_pending_requests"] == limits["grpc.server.max_pending_requests_hard_limit"]
    assert not limits.keys() & dict(server_options(1)).keys()


def test_one_connection_cannot_have_all_the_calls_that_may_wait_to_be_looked_at() -> None:
    """Before, 3,000 calls of one peer made a shard's next Describe fail."""
    for limits in (dict(public_limits(7)), dict(peer_limits())):
        assert limits["grpc.max_concurrent_streams"] < limits["grpc.server.max_pending_requests"]

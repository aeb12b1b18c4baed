"""How our processes connect: the limits and timers of every channel and server."""

from __future__ import annotations

from collections.abc import Callable

import grpc.aio

from stagecoach.rpc.shard_rpc import response_limits

# Messages between callers and a router hold prompts and tokens.
MAX_PUBLIC_MESSAGE_BYTES = 4 * 2**20
# Messages between a router and shards hold hidden states: those of 2,048 tokens x 8,192 x float32 are 64 MiB, and a
# longer prefill is cut into chunks.
MAX_SHARD_MESSAGE_BYTES = 128 * 2**20

# A peer that vanished without a word (its machine lost power, a firewall forgot the flow) is noticed after the sum of
# the two at most, while a call is open.
KEEPALIVE_INTERVAL_S = 20.0
KEEPALIVE_TIMEOUT_S = 10.0

DEFAULT_CONNECT_TIMEOUT_S = 5.0
# Whoever connects has so long for the handshake. With gRPC's own two minutes, few strangers could hold many
# connections.
HANDSHAKE_TIMEOUT_S = 10.0
# A connection without a call is closed after so long. Its channel makes another one when it needs it.
MAX_IDLE_S = 300.0
# How many calls may wait for the event loop to look at them, which takes it some 0.3 ms each, and in a flood 2 ms. Each
# takes some 190 KB of gRPC's. Beyond its own limit of 1,000, gRPC cancels calls without saying why.
MAX_UNSEEN_CALLS = 4096
# How many calls one connection may have open: fewer than may wait unseen, so that it cannot take all of these places,
# and more than callers send at once before they know of the limit.
MAX_STREAMS = MAX_UNSEEN_CALLS * 3 // 4
# The same for a server whose callers are routers and shards, of which each has a few calls.
MAX_PEER_STREAMS = 256
# The pause between two attempts to connect. It is short at first, because every call fails at once during it.
FIRST_RECONNECT_DELAY_S = 0.1
MAX_RECONNECT_DELAY_S = 3.0

Options = list[tuple[str, int | str]]
# Opens a channel to the shard at HOST:PORT. How links are encrypted is decided where one is made
# (stagecoach.security.tls).
Dial = Callable[[str], grpc.aio.Channel]


def channel_options(max_message_bytes: int, *, connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S) -> Options:
    """The options of a channel whose messages, either way, have at most `max_message_bytes`.

    An attempt to connect ends after `connect_timeout_s`, and with it the calls that wait for it (UNAVAILABLE). The
    channel has its own connection, and does not go through an `http_proxy` of the environment, which is for the web.
    """
    return [
        *_message_limits(max_message_bytes),
        *_keepalive(),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),  # no limit: a stream may be silent for as long as a prefill takes
        ("grpc.min_reconnect_backoff_ms", _milliseconds(connect_timeout_s)),  # gRPC's name for the connect timeout
        ("grpc.initial_reconnect_backoff_ms", _milliseconds(FIRST_RECONNECT_DELAY_S)),
        ("grpc.max_reconnect_backoff_ms", _milliseconds(MAX_RECONNECT_DELAY_S)),
        ("grpc.dns_ares_query_timeout", _milliseconds(connect_timeout_s)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]


def _keepalive() -> Options:
    return [
        ("grpc.keepalive_time_ms", _milliseconds(KEEPALIVE_INTERVAL_S)),
        ("grpc.keepalive_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT_S)),
        # That of any ping, one that measures the bandwidth included. While such a one is out no other is sent, so its
        # timeout, a minute by default, is the one that counts.
        ("grpc.http2.ping_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT_S)),
    ]


def server_options(max_message_bytes: int) -> Options:
    """The options of a server whose callers use `channel_options`.

    It accepts their keepalive pings, which gRPC by default takes for abuse (its limit is one in five minutes), and
    sends the same. It refuses to share a port with another process, which would get half of the calls.
    """
    return [
        *_message_limits(max_message_bytes),
        *_keepalive(),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(KEEPALIVE_INTERVAL_S / 2)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _milliseconds(KEEPALIVE_INTERVAL_S / 2)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", _milliseconds(HANDSHAKE_TIMEOUT_S)),
    ]


def public_limits(max_connections: int) -> Options:
    """Further options, for a server that strangers can reach.

    Beyond `max_connections` at a time, new ones are closed. Of one connection, gRPC resets the calls beyond
    MAX_STREAMS, and nobody tells the caller when to come back.
    """
    return [
        *_call_limits(MAX_STREAMS),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_connection_idle_ms", _milliseconds(MAX_IDLE_S)),
    ]


def shard_channel_options() -> Options:
    """Those of a channel to a shard: what holds a payload may be large, other answers only as large as they need be."""
    return [*channel_options(MAX_SHARD_MESSAGE_BYTES), ("grpc.service_config", response_limits())]


def peer_limits() -> Options:
    """Further options, for a server that only routers and shards can reach."""
    return _call_limits(MAX_PEER_STREAMS)


def _call_limits(max_streams: int) -> Options:
    return [
        ("grpc.max_concurrent_streams", max_streams),
        ("grpc.server.max_pending_requests", MAX_UNSEEN_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_UNSEEN_CALLS),
    ]


def dial_plainly(address: str) -> grpc.aio.Channel:
    """A channel to a shard without encryption."""
    return grpc.aio.insecure_channel(address, options=shard_channel_options())


def _message_limits(max_message_bytes: int) -> Options:
    assert max_message_bytes > 0  # gRPC reads -1 as "no limit"
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))

"""How our processes connect: the limits and timers of every channel and server, and what an address looks like."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

import grpc.aio

from stagecoach.errors import InvalidArgument

# Between callers and a router: prompts and tokens.
MAX_PUBLIC_MESSAGE_BYTES = 4 * 2**20
# Between a router and shards: hidden states. 2,048 tokens x 8,192 x float32 are 64 MiB; a longer prefill is chunked.
MAX_SHARD_MESSAGE_BYTES = 128 * 2**20

# A peer that vanished without a word (its machine lost power, a firewall forgot the flow) is found out in at most the
# sum of the two. Asked only while a call is open.
KEEPALIVE_INTERVAL_S = 20.0
KEEPALIVE_TIMEOUT_S = 10.0

DEFAULT_CONNECT_TIMEOUT_S = 5.0
# Whoever connects and does not say by then who they are is cut off: gRPC's own two minutes let few strangers take many
# connections.
HANDSHAKE_TIMEOUT_S = 10.0
# A connection without a call is closed after so long; a channel makes another one when it has need of it.
MAX_IDLE_S = 300.0
# Calls of all connections that have arrived and that the event loop has not looked at yet, which takes it some 0.3 ms
# each. gRPC's own limit is 1,000, and beyond that it cancels calls without a word.
MAX_UNSEEN_CALLS = 8192
# Between two attempts to connect. Short at first, because a call fails at once while none is being made.
FIRST_RECONNECT_DELAY_S = 0.1
MAX_RECONNECT_DELAY_S = 3.0

# In one list of shards.
MAX_ADDRESSES = 1024

_MAX_HOST_LENGTH = 253
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")

Options = list[tuple[str, int]]
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
        ("grpc.keepalive_time_ms", _milliseconds(KEEPALIVE_INTERVAL_S)),
        ("grpc.keepalive_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT_S)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),  # no limit: a stream may be silent for as long as a prefill takes
        ("grpc.min_reconnect_backoff_ms", _milliseconds(connect_timeout_s)),  # gRPC's name for the connect timeout
        ("grpc.initial_reconnect_backoff_ms", _milliseconds(FIRST_RECONNECT_DELAY_S)),
        ("grpc.max_reconnect_backoff_ms", _milliseconds(MAX_RECONNECT_DELAY_S)),
        ("grpc.dns_ares_query_timeout", _milliseconds(connect_timeout_s)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(max_message_bytes: int) -> Options:
    """The options of a server whose callers use `channel_options`.

    It accepts their keepalive pings, which gRPC's own limit (one in five minutes) takes for abuse, sends the same, and
    refuses to share a port with another process, which would get half of the calls.
    """
    return [
        *_message_limits(max_message_bytes),
        ("grpc.keepalive_time_ms", _milliseconds(KEEPALIVE_INTERVAL_S)),
        ("grpc.keepalive_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT_S)),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(KEEPALIVE_INTERVAL_S / 2)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _milliseconds(KEEPALIVE_INTERVAL_S / 2)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", _milliseconds(HANDSHAKE_TIMEOUT_S)),
    ]


def public_limits(max_connections: int) -> Options:
    """What a server takes of those whom it does not know, beside `server_options`.

    Beyond `max_connections` at a time, new ones are closed. There is no limit on one connection's calls: gRPC resets
    those beyond it, and a caller would not learn when to come back.
    """
    return [
        ("grpc.server.max_pending_requests", MAX_UNSEEN_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_UNSEEN_CALLS),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_connection_idle_ms", _milliseconds(MAX_IDLE_S)),
    ]


def dial_plainly(address: str) -> grpc.aio.Channel:
    """A channel to a shard without encryption."""
    return grpc.aio.insecure_channel(address, options=channel_options(MAX_SHARD_MESSAGE_BYTES))


def is_loopback(host: str) -> bool:
    """Whether only this machine's processes can reach a listener on `host`, as `split_address` gives it.

    Of names only `localhost` counts: what another one leads to is its resolver's to say.
    """
    if host.lower() == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def check_address(address: str, field: str, *, listening: bool = False) -> str:
    """`address` as it came, if it is HOST:PORT; an IPv6 host stands in brackets. Else InvalidArgument with `field`.

    The port is 1 to 65535; when `listening`, also 0, which means any free port.
    """
    host, port = split_address(address, field)
    first_port = 0 if listening else 1
    if not first_port <= port <= 65535:
        limit = f"[{first_port}, 65535]"
        raise InvalidArgument(f"{field}: port {port} is not in {limit}", field=field, limit=limit, value=address)
    if host.startswith("["):
        _check_ip(host[1:-1], 6, address, field)
    elif re.fullmatch(r"[0-9.]+", host):
        _check_ip(host, 4, address, field)
    elif len(host) > _MAX_HOST_LENGTH or not _HOST_NAME.fullmatch(host):
        raise _malformed(address, field, f"{host[:80]!r} is not a host name")
    return address


def read_addresses(text: str, field: str) -> list[str]:
    """The addresses in "HOST:PORT,HOST:PORT", each for a process of its own. Else InvalidArgument with `field`."""
    parts = text.split(",", MAX_ADDRESSES)
    if len(parts) > MAX_ADDRESSES:
        raise InvalidArgument(f"{field}: more than {MAX_ADDRESSES} addresses", field=field, limit=MAX_ADDRESSES)
    addresses = [check_address(part.strip(), field) for part in parts]
    twice = next((address for address, count in Counter(addresses).items() if count > 1), None)
    if twice is not None:
        raise InvalidArgument(f"{field}: {twice} is named twice", field=field, value=twice)
    return addresses


def split_address(address: str, field: str) -> tuple[str, int]:
    """The host (an IPv6 one still in its brackets) and the port of HOST:PORT; neither is looked at any closer."""
    if not isinstance(address, str):
        raise _malformed(repr(address), field, "it is not a string")
    if "//" in address:
        raise _malformed(address, field, "leave the scheme out")
    match = re.fullmatch(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]+):(?P<port>[0-9]{1,6})", address)
    if match is None:
        reason = "put an IPv6 host in brackets" if address.count(":") > 1 and "[" not in address else ""
        raise _malformed(address, field, reason)
    return match["host"], int(match["port"])


def _check_ip(text: str, version: int, address: str, field: str) -> None:
    try:
        ipaddress.IPv6Address(text) if version == 6 else ipaddress.IPv4Address(text)
    except ValueError as error:
        raise _malformed(address, field, f"{text!r} is not an IPv{version} address") from error


def _malformed(address: str, field: str, reason: str) -> InvalidArgument:
    text = f"{field} must be HOST:PORT, for example 127.0.0.1:50050; got {address[:200]!r}"
    return InvalidArgument(f"{text} ({reason})" if reason else text, field=field, limit="HOST:PORT", value=address)


def _message_limits(max_message_bytes: int) -> Options:
    assert max_message_bytes > 0  # gRPC reads -1 as "no limit"
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))

"""What both clients are made from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

import grpc
import grpc.aio

from stagecoach.errors import InvalidArgument
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S, MAX_PUBLIC_MESSAGE_BYTES, channel_options, check_address
from stagecoach_client.requests import check_timeout
from stagecoach_client.retry import Attempts
from stagecoach_client.tls import Tls

DEFAULT_TARGET = "127.0.0.1:50050"
API_KEY_VARIABLE = "STAGECOACH_API_KEY"
# A generation's; long, because tokens that arrive show that it lives, and keepalive finds a server that does not.
DEFAULT_TIMEOUT_S = 3600.0
# What a call that only reads may take, unless the caller says less.
READ_TIMEOUT_S = 30.0
# What a stream that is closed before its end waits for the server's word that a lingering request is over.
CANCEL_TIMEOUT_S = 2.0
# 1.5 s of waiting for an address where nobody answers, 15 s for a router that says "no pipeline yet, come back in 1 s":
# enough for a small model to load.
DEFAULT_MAX_RETRIES = 4
MAX_RETRIES = 100

# What calls carry beside their message.
Metadata = tuple[tuple[str, str], ...]


def choose_api_key(api_key: str | None) -> str | None:
    """The key to send: `api_key`, else the environment's; "" is none. Raises InvalidArgument, without quoting it."""
    key = os.environ.get(API_KEY_VARIABLE, "").strip() if api_key is None else api_key
    if not isinstance(key, str) or not re.fullmatch(r"[!-~]*", key):
        text = "api_key must be visible ASCII characters without a space"
        raise InvalidArgument(text, field="api_key", limit="visible ASCII")
    return key or None


def peer_name(target: str, channel: object | None) -> str:
    """What errors call the other side. A channel that was passed in leads where it leads, not to the default target."""
    return "the given channel" if channel is not None and target == DEFAULT_TARGET else target


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a client calls and how patient it is. Raises InvalidArgument for what cannot be."""

    target: str = DEFAULT_TARGET
    timeout_s: float = DEFAULT_TIMEOUT_S
    connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S
    max_retries: int = DEFAULT_MAX_RETRIES
    api_key: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    def __post_init__(self) -> None:
        check_address(self.target, "target")
        for name, value in (("timeout_s", self.timeout_s), ("connect_timeout_s", self.connect_timeout_s)):
            if check_timeout(value, name) is None:
                raise InvalidArgument(f"{name} must be a number of seconds", field=name, limit="> 0", value=None)
        count = self.max_retries
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_RETRIES:
            text = f"max_retries must be a whole number in [0, {MAX_RETRIES}]; got {count!r}"
            raise InvalidArgument(text, field="max_retries", limit=f"[0, {MAX_RETRIES}]", value=count)

    @property
    def metadata(self) -> Metadata | None:
        """Of every call."""
        return None if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    def channel(self) -> grpc.Channel:
        """A new channel to `target`. Raises ConfigError for TLS files that cannot be used."""
        options = channel_options(MAX_PUBLIC_MESSAGE_BYTES, connect_timeout_s=self.connect_timeout_s)
        if self.tls is None:
            return grpc.insecure_channel(self.target, options)
        return grpc.secure_channel(self.target, self.tls.credentials(), [*options, *self.tls.channel_options()])

    def async_channel(self) -> grpc.aio.Channel:
        """The same for asyncio."""
        options = channel_options(MAX_PUBLIC_MESSAGE_BYTES, connect_timeout_s=self.connect_timeout_s)
        if self.tls is None:
            return grpc.aio.insecure_channel(self.target, options)
        return grpc.aio.secure_channel(self.target, self.tls.credentials(), [*options, *self.tls.channel_options()])

    def generate_attempts(self, timeout_s: float | None) -> Attempts:
        """For a generation; `timeout_s` is the caller's wish."""
        return Attempts(timeout_s or self.timeout_s, self.max_retries)

    def read_attempts(self, timeout_s: float | None) -> Attempts:
        """For a call that only reads; `timeout_s` is the caller's wish."""
        return Attempts(check_timeout(timeout_s) or min(self.timeout_s, READ_TIMEOUT_S), self.max_retries)

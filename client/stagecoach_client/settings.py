"""What both clients are made from: where they call, how patient they are, and what every call of theirs carries."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from stagecoach.errors import InvalidArgument
from stagecoach.rpc.addresses import check_address
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S, MAX_PUBLIC_MESSAGE_BYTES, channel_options
from stagecoach_client.requests import check_timeout
from stagecoach_client.retry import Attempts
from stagecoach_client.tls import Tls

DEFAULT_TARGET = "127.0.0.1:50050"
API_KEY_VARIABLE = "STAGECOACH_API_KEY"
# The deadline of a generation. It may be long: tokens that arrive show that the server lives, and gRPC's keepalive
# finds one that does not.
DEFAULT_TIMEOUT_S = 3600.0
# The longest deadline of a call that only reads.
READ_TIMEOUT_S = 30.0
# How long a stream that is closed before its end waits for the server to confirm that a lingering request is over.
CANCEL_TIMEOUT_S = 2.0
# With so many, the waits between the attempts add up to 1.5 s for an address where nobody answers, and to 15 s for a
# router that says "no pipeline yet, come back in 1 s", which is enough for a small model to load.
DEFAULT_MAX_RETRIES = 4
MAX_RETRIES = 100


def choose_api_key(api_key: str | None) -> str | None:
    """The key to send: `api_key`, or else the environment's; "" means none.

    Raises InvalidArgument, which does not quote the key.
    """
    key = os.environ.get(API_KEY_VARIABLE, "").strip() if api_key is None else api_key
    if not isinstance(key, str) or not re.fullmatch(r"[!-~]*", key):
        text = "api_key must be visible ASCII characters without a space"
        raise InvalidArgument(text, field="api_key", limit="visible ASCII")
    return key or None


def peer_name(target: str, channel: object | None) -> str:
    """What errors call the other side.

    Nobody knows where a channel leads that was passed in, so the default target is not named for it.
    """
    return "the given channel" if channel is not None and target == DEFAULT_TARGET else target


@dataclass(frozen=True, slots=True)
class Settings:
    """A client's settings, checked. Raises InvalidArgument with the name of the one that cannot be."""

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

    def channel(self) -> grpc.Channel:
        """A new channel to `target`. Raises ConfigError for TLS files that cannot be used."""
        options = channel_options(MAX_PUBLIC_MESSAGE_BYTES, connect_timeout_s=self.connect_timeout_s)
        if self.tls is None:
            return grpc.insecure_channel(self.target, options)
        return grpc.secure_channel(self.target, self.tls.credentials(), [*options, *self.tls.channel_options()])

    async def async_channel(self) -> grpc.aio.Channel:
        """As `channel`, for the event loop that runs now, which waits for no file."""
        options = channel_options(MAX_PUBLIC_MESSAGE_BYTES, connect_timeout_s=self.connect_timeout_s)
        if self.tls is None:
            return grpc.aio.insecure_channel(self.target, options)
        credentials = await self.tls.load_credentials()
        return grpc.aio.secure_channel(self.target, credentials, [*options, *self.tls.channel_options()])

    def call_options(self, timeout_s: float) -> dict[str, Any]:
        """What every call on a stub is made with: its deadline, and the API key if there is one.

        `wait_for_ready` is off so that an address where nobody answers is reported, and retried by our own rules.
        """
        metadata = None if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)
        return {"timeout": timeout_s, "wait_for_ready": False, "metadata": metadata}

    def generate_attempts(self, timeout_s: float | None) -> Attempts:
        """The attempts of one generation; `timeout_s` is what its caller asked for."""
        return Attempts(timeout_s or self.timeout_s, self.max_retries)

    def read_attempts(self, timeout_s: float | None) -> Attempts:
        """The attempts of one call that only reads; `timeout_s` is what its caller asked for."""
        return Attempts(check_timeout(timeout_s) or min(self.timeout_s, READ_TIMEOUT_S), self.max_retries)

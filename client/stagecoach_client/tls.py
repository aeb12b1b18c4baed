"""The certificates with which a client reaches a router that speaks TLS."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from stagecoach.errors import ConfigError
from stagecoach.security.pem_files import check_ca, check_key_pair, read_file
from stagecoach.security.tls import name_override
from stagecoach.security.watched_files import read_at_start

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Tls:
    """Which PEM files a connection uses. They are read when a client is made.

    `ca` is the authority that has signed the router's certificate; None trusts those of the web, which gRPC brings.
    `cert` and `key` say who the caller is, to a router that asks for it (`--tls-client-ca`). `server_name` is the name
    that the router's certificate must be for; "" takes the host of the address. Raises ConfigError for files that
    cannot be used.
    """

    ca: FilePath | None = None
    cert: FilePath | None = None
    key: FilePath | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            field = "tls_cert" if self.cert is None else "tls_key"
            raise ConfigError(f"{field}: a certificate and its key go together", field=field)

    def credentials(self) -> grpc.ChannelCredentials:
        """What a channel to the router is opened with."""
        ca = None if self.ca is None else read_file(Path(self.ca), "tls_ca")
        if ca is not None:
            check_ca(ca, str(self.ca))
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(ca)
        cert, key = Path(self.cert), Path(self.key)
        pair = read_file(key, "tls_key"), read_file(cert, "tls_cert")
        check_key_pair(cert, key)
        return grpc.ssl_channel_credentials(ca, *pair)

    async def load_credentials(self) -> grpc.ChannelCredentials:
        """As `credentials`, beside the event loop. Raises ConfigError, too, where files cannot be read in time."""
        files = (Path(path) for path in (self.ca, self.cert, self.key) if path is not None)
        return await read_at_start(self.credentials, "tls_ca", *files)

    def channel_options(self) -> list[tuple[str, Any]]:
        """The options that such a channel needs besides."""
        return name_override(self.server_name)

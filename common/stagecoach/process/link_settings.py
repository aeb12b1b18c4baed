"""The settings of a process that listens, and calls shards: how its links are encrypted."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliImplicitFlag

from stagecoach.process.settings import ProcessSettings
from stagecoach.security.tls import SHARD_NAME


class LinkSettings(ProcessSettings):
    """What the router's and the shards' settings share."""

    tls_cert: Path | None = Field(None, description="PEM: this process's certificate; with tls-key and tls-ca")
    tls_key: Path | None = Field(None, description="PEM: its key, not encrypted")
    tls_ca: Path | None = Field(None, description="PEM: the CA of the certificates of routers and shards")
    tls_shard_name: str = Field(
        SHARD_NAME, description="the name that shards' certificates must have; empty: the host of their address"
    )
    insecure_listen: CliImplicitFlag[bool] = Field(
        False, description="without TLS: listen also where other machines can reach it"
    )

"""`stagecoach certs`: certificates for a router and its shards on several machines."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from stagecoach.errors import ConfigError
from stagecoach_cli import extras

_DAYS = 365


def certs(
    folder: Annotated[Path, typer.Argument(help="Where to put them; made if absent.")],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="What callers call the router's machine, name or IP; may be given again."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long they are valid.")] = _DAYS,
) -> None:
    """Make a CA, and a certificate each for the router and for all shards. The CA's key is not kept."""
    extras.require("certs", extras.CERTIFICATES, "[cli] extra")
    from stagecoach_local.certificates import CA_FILE, issue_cluster

    if (folder / CA_FILE).exists():  # what other machines were given would no longer match
        raise ConfigError(f"{folder} has certificates already: take another folder", field="folder", value=folder)
    try:
        issued = issue_cluster(folder, router_hosts=host or (), lifetime=datetime.timedelta(days=days))
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}", field="folder", value=folder) from error
    for program, own in (("shard", issued.shard), ("router", issued.router)):
        print(f"stagecoach-{program} --tls-cert {own.cert} --tls-key {own.key} --tls-ca {issued.ca} ...")
    print(f"stagecoach status --tls-ca {issued.ca} ...")
    print("Copy each process its own three files, callers the CA's, and no key to anybody else.")

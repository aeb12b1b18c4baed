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
    folder: Annotated[Path, typer.Argument(help="The folder to put them into. It is made if it is absent.")],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="A name or IP address at which callers reach the router. Repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="For how many days they are valid.")] = _DAYS,
) -> None:
    """Make a CA, a certificate for the router, and one for all shards. The CA's key is not kept."""
    extras.require("certs", extras.CERTIFICATES, "[cli] extra")
    from stagecoach_local.certificates import CA_FILE, issue_cluster

    if (folder / CA_FILE).exists():  # new ones would not match those that other machines were given
        raise ConfigError(f"{folder} has certificates already: take another folder", field="folder", value=folder)
    try:
        issued = issue_cluster(folder, router_hosts=host or (), lifetime=datetime.timedelta(days=days))
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}", field="folder", value=folder) from error
    for program, own in (("shard", issued.shard), ("router", issued.router)):
        print(f"stagecoach-{program} --tls-cert {own.cert} --tls-key {own.key} --tls-ca {issued.ca} ...")
    print(f"stagecoach status --tls-ca {issued.ca} ...")
    print("Each process needs the three files in its line, callers the CA's, and nobody else any key.")

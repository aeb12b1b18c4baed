"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stagecoach_client.settings import API_KEY_VARIABLE, DEFAULT_TARGET
from stagecoach_client.tls import Tls

__all__ = [
    "DEFAULT_TARGET",
    "ApiKey",
    "DType",
    "MaxTokens",
    "ModelName",
    "Seed",
    "Target",
    "Temperature",
    "TlsCA",
    "TlsCert",
    "TlsKey",
    "TlsServerName",
    "TopK",
    "TopP",
    "choose_tls",
]


class DType(StrEnum):
    """What shards may compute in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


Target = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the router is.")]
# The variable is the better place: a command line can be read by whoever is on the machine.
ApiKey = Annotated[
    str | None, typer.Option(metavar="KEY", envvar=API_KEY_VARIABLE, help="For a router that wants one.")
]
ModelName = Annotated[str, typer.Option("--model", help="The model's name; not needed where there is only one.")]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens to generate; default: what the context takes.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token; default: 1.")]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0: off.")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest tokens whose probability reaches p.")]
Seed = Annotated[int | None, typer.Option(help="Makes the choice of tokens repeatable.")]
TlsCA = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca", envvar="STAGECOACH_TLS_CA", metavar="FILE", help="Speak TLS; PEM of the CA that the router is of."
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert", envvar="STAGECOACH_TLS_CERT", metavar="FILE", help="Your certificate, if the router asks for one."
    ),
]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", envvar="STAGECOACH_TLS_KEY", metavar="FILE", help="Its key.")]
TlsServerName = Annotated[
    str,
    typer.Option(
        envvar="STAGECOACH_TLS_SERVER_NAME", metavar="NAME", help="The router's name, if not the host in --target."
    ),
]


def choose_tls(ca: Path | None, cert: Path | None, key: Path | None, server_name: str) -> Tls | None:
    """What the four options say together; None: without any of them nothing is encrypted."""
    return Tls(ca, cert, key, server_name) if ca or cert or key or server_name else None

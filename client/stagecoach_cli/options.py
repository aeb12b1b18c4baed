"""Options that several commands share: where the router is, and how to be let in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stagecoach.errors import InvalidArgument
from stagecoach_client.settings import API_KEY_VARIABLE, DEFAULT_TARGET
from stagecoach_client.tls import Tls

__all__ = [
    "DEFAULT_TARGET",
    "ApiKey",
    "DType",
    "ModelName",
    "Stages",
    "Target",
    "TlsCA",
    "TlsCert",
    "TlsKey",
    "TlsServerName",
    "choose_tls",
    "parse_whole_numbers",
]


class DType(StrEnum):
    """The number formats that shards can compute in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


Stages = Annotated[
    str,
    typer.Option(metavar="N|RANGES", help="Split the layers over N shards, or into layer ranges such as 0:10,10:30."),
]
Target = Annotated[str, typer.Option(metavar="HOST:PORT", help="The address of the router.")]
# The environment is the better place for a key: everybody on the machine can read a command line.
ApiKey = Annotated[
    str | None, typer.Option(metavar="KEY", envvar=API_KEY_VARIABLE, help="Your API key, if the router wants one.")
]
ModelName = Annotated[str, typer.Option("--model", help="The model's name. Not needed if the router serves only one.")]
TlsCA = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        envvar="STAGECOACH_TLS_CA",
        metavar="FILE",
        help="Speak TLS to a router whose certificate is signed by the CA in this PEM file.",
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        envvar="STAGECOACH_TLS_CERT",
        metavar="FILE",
        help="Your own certificate, if the router asks for one.",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option("--tls-key", envvar="STAGECOACH_TLS_KEY", metavar="FILE", help="The key of your own certificate."),
]
TlsServerName = Annotated[
    str,
    typer.Option(
        envvar="STAGECOACH_TLS_SERVER_NAME",
        metavar="NAME",
        help="The name in the router's certificate, if it is not the host of --target.",
    ),
]


def choose_tls(ca: Path | None, cert: Path | None, key: Path | None, server_name: str) -> Tls | None:
    """What the four TLS options say together. None if none of them is given: then nothing is encrypted."""
    return Tls(ca, cert, key, server_name) if ca or cert or key or server_name else None


def parse_whole_numbers(text: str, field: str) -> list[int]:
    """The numbers in "1,8,32". Raises InvalidArgument, which names the field."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        message = f"{field} must be whole numbers separated by commas, for example 1,8,32; got {text!r:.80}"
        raise InvalidArgument(message, field=field, value=text) from error

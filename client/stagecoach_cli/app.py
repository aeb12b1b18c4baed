"""The `stagecoach` command, put together from its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from stagecoach import __version__
from stagecoach_cli.bench import bench
from stagecoach_cli.certs import certs
from stagecoach_cli.chat import chat
from stagecoach_cli.demo import demo
from stagecoach_cli.generate import generate
from stagecoach_cli.import_checkpoint import import_checkpoint
from stagecoach_cli.keys import keys
from stagecoach_cli.status import status
from stagecoach_cli.up import up

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(up)
app.command()(chat)
app.command()(generate)
app.command()(status)
app.command()(bench)
app.command()(demo)
app.command()(certs)
app.command("import")(import_checkpoint)
app.add_typer(keys, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stagecoach {__version__}")
        raise typer.Exit


@app.callback()
def stagecoach(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve a language model that is too big for one machine, and talk to it."""

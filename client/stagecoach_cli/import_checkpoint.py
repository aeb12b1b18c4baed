"""`stagecoach import`: makes a checkpoint folder of a GGUF file. The work is done by the package stagecoach_gguf."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from stagecoach_cli import extras
from stagecoach_cli.stop_signals import on_stop_signals


def import_checkpoint(
    source: Annotated[str, typer.Argument(help="A .gguf file, or the name of an installed package with one in it.")],
    target: Annotated[str, typer.Argument(help="The folder to make.")],
) -> None:
    """Make a checkpoint folder, which shards can load, of a GGUF file."""
    extras.require("import", extras.IMPORT, "[import] extra")
    child = subprocess.Popen([sys.executable, "-m", "stagecoach_gguf", source, target])
    # The child tidies up, so it is waited for. A ctrl-C reaches it as well, and twice does no harm.
    on_stop_signals(lambda number, frame: child.send_signal(number))
    status = child.wait()
    raise typer.Exit(status if status >= 0 else 128 - status)

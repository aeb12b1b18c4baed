"""`stagecoach import`: makes a checkpoint folder of a GGUF file. The work is done by the package stagecoach_gguf."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from stagecoach_cli import extras


def import_checkpoint(
    source: Annotated[str, typer.Argument(help="A .gguf file, or the name of an installed package with one in it.")],
    target: Annotated[str, typer.Argument(help="The folder to make.")],
) -> None:
    """Make a checkpoint folder, which shards can load, of a GGUF file."""
    extras.require("import", extras.IMPORT, "[import] extra")
    child = subprocess.Popen([sys.executable, "-m", "stagecoach_gguf", source, target])
    raise typer.Exit(_wait(child))


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The child's exit status. A ctrl-C also reaches the child, which then tidies up, so it is still waited for."""
    while True:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            continue
        return status if status >= 0 else 128 - status

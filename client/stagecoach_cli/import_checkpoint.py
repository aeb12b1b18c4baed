"""`stagecoach import`: a GGUF file becomes a checkpoint folder. The work is the shard server package's."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from stagecoach_cli import extras


def import_checkpoint(
    source: Annotated[str, typer.Argument(help="A .gguf file, or an installed package that holds one.")],
    target: Annotated[str, typer.Argument(help="The folder to make.")],
) -> None:
    """Turn a GGUF file into a checkpoint folder that shards can load."""
    extras.require("import", extras.IMPORT, "[import] extra")
    child = subprocess.Popen([sys.executable, "-m", "stagecoach_gguf", source, target])
    raise typer.Exit(_wait(child))


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The child's exit status. A ctrl-C reaches the child, too, which then tidies up; so it is waited for."""
    while True:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            continue
        return status if status >= 0 else 128 - status

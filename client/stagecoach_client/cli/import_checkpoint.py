"""`stagecoach import`: a GGUF file becomes a checkpoint folder. The work is the shard server package's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Annotated

import typer

from stagecoach.errors import ConfigError

# Looked for, not imported: the client knows nothing of the shard server, and torch takes seconds to import.
_NEEDED_PACKAGES = ("stagecoach_shard", "torch", "safetensors", "gguf", "tokenizers")


def import_checkpoint(
    source: Annotated[str, typer.Argument(help="A .gguf file, or an installed package that holds one.")],
    target: Annotated[str, typer.Argument(help="The folder to make.")],
) -> None:
    """Turn a GGUF file into a checkpoint folder that shards can load."""
    missing = [name for name in _NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        text = f"stagecoach import needs {', '.join(missing)}: pip install 'stagecoach[import]'"
        raise ConfigError(text, field="import", value=missing[0])
    child = subprocess.Popen([sys.executable, "-m", "stagecoach_shard.gguf_import", source, target])
    raise typer.Exit(_wait(child))


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The child's exit status. A ctrl-C reaches the child, too, which then tidies up; so it is waited for."""
    while True:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            continue
        return status if status >= 0 else 128 - status

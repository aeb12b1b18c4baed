"""Whether the packages that a command starts are there. They are looked for, not imported: torch takes seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from stagecoach.errors import ConfigError

IMPORT = ("stagecoach_shard", "torch", "safetensors", "gguf", "tokenizers")
CLUSTER = (
    *("stagecoach_router", "stagecoach_shard", "grpc_health", "grpc_reflection", "pydantic_settings", "uvloop"),
    *("jinja2", "numpy", "psutil", "safetensors", "tokenizers", "torch", "tqdm"),
)

CERTIFICATES = ("cryptography",)


def require(command: str, packages: Sequence[str], extras: str) -> None:
    """Raises ConfigError with what `stagecoach COMMAND` misses, and the `extras` of our package that bring it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        text = f"stagecoach {command} needs {', '.join(missing)}: install Stagecoach with its {extras}"
        raise ConfigError(text, field=command, value=missing[0])

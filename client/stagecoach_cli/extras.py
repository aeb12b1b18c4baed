"""Whether the packages that a command needs are installed. They are not imported for it: torch alone takes seconds."""

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
    """Raises ConfigError if `stagecoach COMMAND` misses a package; it names the `extras` of ours that bring it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        text = f"stagecoach {command} needs {', '.join(missing)}: install Stagecoach with its {extras}"
        raise ConfigError(text, field=command, value=missing[0])

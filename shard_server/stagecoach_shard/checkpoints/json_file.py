"""The JSON files of a checkpoint folder, which come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

from stagecoach.errors import CheckpointError


def read_json_object(path: Path, max_bytes: int) -> dict[str, object]:
    """The JSON object in `path`. Raises CheckpointError, with the file's name, for anything else."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > max_bytes:
            raise CheckpointError(
                f"{path.name} has {num_bytes} bytes", field=path.name, limit=max_bytes, value=num_bytes
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", field=path.name) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}", field=path.name) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object", field=path.name)
    return value

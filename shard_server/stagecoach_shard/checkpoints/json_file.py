"""The JSON files of a checkpoint folder, which come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

from stagecoach.errors import CheckpointError
from stagecoach.security.watched_files import read_bounded


def read_json_object(path: Path, max_bytes: int) -> dict[str, object]:
    """The JSON object in `path`. Raises CheckpointError, with the file's name, for anything else."""
    try:
        data = read_bounded(path, max_bytes)
        if len(data) > max_bytes:
            text = f"{path.name} has more than {max_bytes} bytes"
            raise CheckpointError(text, field=path.name, limit=max_bytes)
        value = json.loads(data.decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", field=path.name) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}", field=path.name) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object", field=path.name)
    return value

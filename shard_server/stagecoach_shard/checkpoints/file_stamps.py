"""Tells whether a checkpoint's files are still those that were opened.

A shard says what model it has from what it read when it started, and reads layers and tokenizer when it is asked for
them, which may be days later. Files that were replaced meanwhile would be served under the former model's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stagecoach.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What changes with a file's content, whether it is written over or another one is put in its place."""

    inode: int
    num_bytes: int
    modified_ns: int


class FileStamps:
    """The stamps of some files as they were when this was made."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in paths}

    def check(self, path: Path | None = None) -> None:
        """Raises CheckpointError, with the file's name, where `path` has changed; None: where any of them has."""
        for checked in self._stamps if path is None else (path,):
            if _stamp(checked) != self._stamps.get(checked):
                raise CheckpointError(
                    f"{checked} is not the file any more that was there when the shard started: start the shard again",
                    field=checked.name,
                )


def _stamp(path: Path) -> _Stamp | None:
    """None where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _Stamp(status.st_ino, status.st_size, status.st_mtime_ns)

"""Files that an operator replaces while a process runs: certificates, keys, the list of API keys.

They are read whole, within a bound, and only where they are regular files: opening a named pipe that nobody writes to
would otherwise stop for good whoever wants to see what has changed.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

# (st_mtime_ns, st_size, st_ino): differs when the file is another one, also where a link to it was turned.
Signature = tuple[int, int, int]


def signature(path: Path) -> Signature | None:
    """What tells this file from the one that is put in its place; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The file's bytes, at most one more than `max_bytes`, which tells that it is too large.

    Raises OSError where it cannot be read, with EINVAL for what is no regular file.
    """
    # Not blocking concerns the opening only: without it, that of a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return file.read(max_bytes + 1)

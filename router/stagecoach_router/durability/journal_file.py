"""The journal's file as the file system sees it: which one it is, who may read it, and how it goes away."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

# Of SQLite's write-ahead log, beside the database.
LOG_SUFFIX = "-wal"
# Of a file: its device and inode.
Identity = tuple[int, int]
# What a disk says that is full, broken or read-only, or that is gone. Whoever gave the path can do nothing about it.
_DISK_ERRNOS = frozenset(
    {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO}
)
# The same as SQLite says it; the third where there is no room for a log's name.
_DISK_CODES = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY})


def is_of_the_disk(error: Exception) -> bool:
    """Whether it is the disk that fails, and not the file that is wrong: the same file may be good a minute later."""
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRNOS
    # The lowest byte is the kind. Errors that Python itself raises have no code.
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_CODES


def identity_of(path: Path) -> Identity:
    """Which file has this name now. Raises OSError where none has."""
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def log_of(path: Path) -> Path:
    """The write-ahead log of the database at `path`."""
    return path.with_name(path.name + LOG_SUFFIX)


def make_private(path: Path) -> None:
    """Creates the file where there is none, and lets nobody but its owner read it. Raises OSError."""
    # Not blocking concerns the opening only: without it, that of a pipe waits for its other end.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if mode & 0o077:
            os.fchmod(descriptor, 0o600)
            logger.warning("journal: %s could be read by others; now only its owner can", path)
    finally:
        os.close(descriptor)


def delete(path: Path, identity: Identity) -> None:
    """Deletes the database with its log, unless another file has its name by now. Raises OSError."""
    with suppress(FileNotFoundError):
        if identity_of(path) == identity:
            # First the log: a log without its database is nothing, but a database without its log is an earlier state.
            log_of(path).unlink(missing_ok=True)
            path.unlink()

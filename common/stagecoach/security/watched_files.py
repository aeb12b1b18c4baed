"""Files that an operator replaces while a process runs: certificates, keys, the list of API keys.

They are read whole, within a bound, and only where they are regular files: opening a named pipe that nobody writes to
would otherwise stop for good whoever wants to see what has changed. And they are read on a thread, within a limit in
time: a mount whose server is gone stops whoever so much as asks for a file's date.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from stagecoach.errors import ConfigError
from stagecoach.file_access import FILE_TIMEOUT_S, in_time, on_thread, read_in_time

logger = logging.getLogger(__name__)

# How often files are looked at.
CHECK_INTERVAL_S = 1.0
# Of one `WatchedFiles`. Only the end of the process gets rid of a thread that hangs for good.
MAX_HANGING_THREADS = 8

# (st_mtime_ns, st_size, st_ino): differs when the file is another one, also where a link to it was turned.
Signature = tuple[int, int, int]
Content = TypeVar("Content")
_Look = tuple[tuple[Signature | None, ...], Content | ConfigError]


class WatchedFiles(Generic[Content]):
    """What some files hold, as they could last be read.

    `read` reads and checks all of them, and raises ConfigError for what cannot be used. The constructor calls it, on
    the calling thread: `read_at_start` is for an event loop. `field` is the setting that errors name.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], Content], field: str, *, timeout_s: float = FILE_TIMEOUT_S
    ) -> None:
        self._paths = paths
        self._read = read
        self._field = field
        self._timeout_s = timeout_s
        # Before they are read: if they change in between, the next look finds them changed once more.
        self._seen = self._signatures()
        self.content = read()
        self._hanging: list[Future[_Look[Content] | None]] = []
        self.is_hanging = False  # at the latest look
        self._retry_s = timeout_s
        self._next_look_s = 0.0  # time.monotonic()

    async def look(self, *, again: bool = False) -> bool:
        """Whether the files have changed; what they hold is then the `content`. With `again`, as if they had.

        Raises ConfigError, once for each change, where they cannot be used, and once where they cannot be read in time;
        the content stays as it was. Files that hang are looked at again, ever more rarely, by a thread of its own each
        time: the disk may have come back under another mount, and whoever waits for the old one waits for good.
        """
        self._hanging = [each for each in self._hanging if not each.done()]
        if not self._hanging:
            self._next_look_s = 0.0
        if len(self._hanging) >= MAX_HANGING_THREADS or time.monotonic() < self._next_look_s:
            return False
        seen = None if again else self._seen
        looking = on_thread(lambda: self._look(seen))
        try:
            found = await in_time(looking, self._names(), self._timeout_s)
        except TimeoutError as error:
            return self._hangs(looking, error)
        if self.is_hanging:
            logger.info("%s can be read again", self._names())
        self.is_hanging, self._retry_s, self._next_look_s = False, self._timeout_s, 0.0
        if found is None:
            return False
        self._seen, content = found
        if isinstance(content, ConfigError):
            raise content
        self.content = content
        return True

    def _hangs(self, looking: Future[_Look[Content] | None], error: TimeoutError) -> bool:
        self._hanging.append(looking)
        self._next_look_s = time.monotonic() + self._retry_s
        self._retry_s *= 2
        was_hanging, self.is_hanging = self.is_hanging, True
        if not was_hanging:
            raise hangs(self._field, error)
        return False

    def _look(self, seen: tuple[Signature | None, ...] | None) -> _Look[Content] | None:
        """What is there now; None where that is what was there when `seen` was found. For any thread."""
        found = self._signatures()
        if found == seen:
            return None
        try:
            return found, self._read()
        except ConfigError as error:
            return found, error

    def _signatures(self) -> tuple[Signature | None, ...]:
        return tuple(signature(path) for path in self._paths)

    def _names(self) -> str:
        return ", ".join(str(path) for path in self._paths)


async def check_for_ever(check: Callable[[], Awaitable[None]]) -> NoReturn:
    """Has `check` look at some files every second, until cancelled. An error that nobody foresaw costs one look."""
    while True:
        try:
            await check()
        except Exception:
            logger.exception("looking at files that may have changed")
        await asyncio.sleep(CHECK_INTERVAL_S)


async def read_at_start(read: Callable[[], Content], field: str, *paths: Path | None) -> Content:
    """What `read` returns. Raises what it raises, and ConfigError where the files at `paths` cannot be read in time."""
    try:
        return await read_in_time(read, ", ".join(str(path) for path in paths if path is not None))
    except TimeoutError as error:
        raise hangs(field, error) from None


def hangs(field: str, error: TimeoutError) -> ConfigError:
    """The error for files that cannot be read in time."""
    return ConfigError(f"{field}: {error}", field=field)


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
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        data = file.read(min(facts.st_size, max_bytes) + 1)  # room is made for as much as is asked for
        return data if len(data) <= facts.st_size else data + file.read(max_bytes + 1 - len(data))

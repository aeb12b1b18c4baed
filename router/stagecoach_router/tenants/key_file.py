"""The file of API keys while the router runs: read at the start, and again whenever it has changed."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import NoReturn

from stagecoach.errors import ConfigError
from stagecoach.security.api_keys import KeyEntry, read_entries
from stagecoach.security.watched_files import WatchedFiles, check_for_ever, read_at_start, read_bounded
from stagecoach_router.tenants.tenants import Tenants

# An entry has some 300 of them.
MAX_FILE_BYTES = 4 << 20

logger = logging.getLogger(__name__)


class KeyFile:
    """Keeps `tenants` as the file says. A file that cannot be used leaves them as they were, with an error logged.

    A file without keys is one that cannot be used: editors empty a file before they write it, and tenants that were
    gone for that moment would come back with all their limits unused.

    Raises ConfigError where it cannot be used at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = WatchedFiles([path], lambda: _read(path), "api_keys")
        self.tenants = Tenants(self._files.content, time.monotonic())

    @classmethod
    async def load(cls, path: Path) -> KeyFile:
        """Reads it beside the event loop. Raises ConfigError, too, where it cannot be read in time."""
        return await read_at_start(lambda: cls(path), "api_keys", path)

    async def watch(self) -> NoReturn:
        """Looks every second, until cancelled."""
        await check_for_ever(self.check)

    async def check(self) -> None:
        """Takes the file over if it has changed."""
        try:
            has_changed = await self._files.look()
        except ConfigError as error:
            logger.error("API keys stay as they were: %s", error)
            return
        if has_changed:
            entries = self._files.content
            self.tenants.replace(entries, time.monotonic())
            logger.info("%d API keys read from %s", len(entries), self._path)


def _read(path: Path) -> tuple[KeyEntry, ...]:
    try:
        data = read_bounded(path, MAX_FILE_BYTES)
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"api_keys: cannot read {path}: {error.strerror}", field="api_keys", value=path) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"api_keys: {path} is not UTF-8 text", field="api_keys", value=path) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            f"api_keys: {path} has more than {MAX_FILE_BYTES} bytes", field="api_keys", limit=MAX_FILE_BYTES
        )
    try:
        entries = read_entries(text)
    except ConfigError as error:
        raise ConfigError(f"api_keys: {path}: {error}", field="api_keys", value=path) from error
    if not entries:
        raise ConfigError(f"api_keys: {path} holds no key", field="api_keys", value=path)
    return entries

"""The file of API keys while the router runs: read at the start, and again whenever it has changed."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import NoReturn

from stagecoach.errors import ConfigError
from stagecoach.security.api_keys import KeyEntry, read_entries
from stagecoach.security.watched_files import read_bounded, signature
from stagecoach_router.tenants.tenants import Tenants

CHECK_INTERVAL_S = 1.0
# An entry has some 300 of them.
MAX_FILE_BYTES = 4 << 20

logger = logging.getLogger(__name__)


class KeyFile:
    """Keeps `tenants` as the file says. A file that cannot be used leaves them as they were, with an error logged.

    A file without keys is one that cannot be used: editors empty a file before they write it, and tenants that were
    gone for that moment would come back with all their limits unused.

    Raises ConfigError where it cannot be used at the start.
    """

    def __init__(self, path: Path, interval_s: float = CHECK_INTERVAL_S) -> None:
        self._path = path
        self._interval_s = interval_s
        # Before the file is read: if it changes in between, the next look finds it changed once more.
        self._signature = signature(path)
        self.tenants = Tenants(_read(path), time.monotonic())

    async def watch(self) -> NoReturn:
        """Looks every `interval_s`, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.check()

    async def check(self) -> None:
        """Takes the file over if it has changed."""
        try:
            entries = await asyncio.to_thread(self._read_if_changed)
        except ConfigError as error:
            logger.error("API keys stay as they were: %s", error)
            return
        if entries is not None:
            self.tenants.replace(entries, time.monotonic())
            logger.info("%d API keys read from %s", len(entries), self._path)

    def _read_if_changed(self) -> tuple[KeyEntry, ...] | None:
        found = signature(self._path)
        if found == self._signature:
            return None
        self._signature = found
        return _read(self._path)


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

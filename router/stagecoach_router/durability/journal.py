"""What an accepted request needs to outlive the router's process, written while it runs.

The event loop never waits for the disk: what is to be written gathers, and goes to the journal's own thread in one
transaction as soon as the one before is done. A token is shown to callers only when it is in the file, so a router that
comes back after a crash knows every token that anyone has seen. A disk that fails, or hangs, costs the journal and no
answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from stagecoach_router.durability.journal_store import Begin, End, Entry, Forget, JournaledRequest, JournalStore, Token
from stagecoach_router.durability.retention import MAX_AGE_S
from stagecoach_router.requests.completion import OutputDelta
from stagecoach_router.requests.request import RequestKey
from stagecoach_router.requests.request_state import RequestState

Result = TypeVar("Result")

# A disk that takes longer for a transaction hangs, as far as callers can tell, whose answers wait for it.
MAX_WRITE_S = 10.0

logger = logging.getLogger(__name__)


class Journal:
    """One router's journal. `open` it before use. After `close`, or once the disk has failed, it writes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._store: JournalStore | None = None
        self._entries: list[Entry] = []  # for the next transaction
        self._shows: dict[RequestState, int] = {}  # how many deltas that lets be shown
        self._writing: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self) -> None:
        """Raises ConfigError."""
        self._store = await self._in_thread(lambda: JournalStore(self._path))

    async def load(self, fingerprint: str) -> list[JournaledRequest]:
        """What a former process left, in the order in which it was accepted. Raises ConfigError for another model's."""
        store = self._store
        assert store is not None, "load before open"

        def load() -> list[JournaledRequest]:
            store.check_model(fingerprint)
            store.drop_finished_before(time.time() - MAX_AGE_S)
            return store.load()

        return await self._in_thread(load)

    def begin(self, state: RequestState) -> None:
        """A request was accepted, or taken over from a former process: from now on its deltas go through here."""
        if self._store is None:
            return
        num_tokens = [completion.num_tokens for completion in state.completions]

        def tap(delta: OutputDelta) -> None:
            if state.ended:  # it failed, and was forgotten: what is written now would be left over in the file
                return
            if self._closed:  # not in the file: the next process will compute it, and show it
                return
            if self._store is None:  # the disk has failed: better an answer that does not outlive us than none
                state.show(1)
                return
            self._shows[state] = self._shows.get(state, 0) + 1
            self._write(Token(state.key, delta.index, num_tokens[delta.index], delta.sampled))
            num_tokens[delta.index] += 1

        state.tap = tap
        self._write(Begin(state.key, state.digest, state.request))

    def end(self, key: RequestKey) -> None:
        """A request has finished; it is kept for a while, for a caller who comes back for its output."""
        self._write(End(key, time.time()))

    def forget(self, key: RequestKey) -> None:
        """A request has failed, or was kept for long enough: nothing of it is needed any more."""
        self._write(Forget(key))

    async def close(self) -> None:
        """Writes what is left. What is told later is not written, so the next process finds what runs now."""
        self._closed = True
        while self._writing is not None:
            await self._writing
        store, self._store = self._store, None
        if store is not None:
            await self._close(store)
        self._thread.shutdown(wait=False)

    def _write(self, entry: Entry) -> None:
        if self._store is not None and not self._closed:
            self._entries.append(entry)
            self._write_next()

    def _write_next(self) -> None:
        if self._writing is None and self._entries and self._store is not None:
            self._writing = asyncio.get_running_loop().create_task(self._transact(self._store))

    async def _transact(self, store: JournalStore) -> None:
        entries, self._entries = self._entries, []
        shows, self._shows = self._shows, {}
        failed = False
        try:
            await self._in_time(lambda: store.apply(entries))
        except Exception as error:  # the disk's, or a bug's: without this, answers would be held back for ever
            logger.error("journal: %s: %s: requests will not outlive this process", self._path, error)
            failed, self._store = True, None
            self._entries.clear()
            for state, num_deltas in self._shows.items():  # what came meanwhile
                shows[state] = shows.get(state, 0) + num_deltas
            self._shows.clear()
        for state, num_deltas in shows.items():
            state.show(num_deltas)
        if failed:
            await self._close(store)
        self._writing = None
        self._write_next()

    async def _close(self, store: JournalStore) -> None:
        try:
            await self._in_time(store.close)
        except Exception as error:  # what was written before is there or not: nobody can do anything about it now
            logger.error("journal: %s could not be closed: %s", self._path, error)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _in_time(self, work: Callable[[], None]) -> None:
        """Does the work. Raises TimeoutError where it takes too long; it is then done later, or never."""
        done = asyncio.ensure_future(self._in_thread(work))
        done.add_done_callback(lambda done: done.cancelled() or done.exception())  # when nobody waits any more
        try:
            async with asyncio.timeout(MAX_WRITE_S):
                await asyncio.shield(done)
        except TimeoutError:
            raise TimeoutError(f"the disk has not answered in {MAX_WRITE_S:g} s") from None

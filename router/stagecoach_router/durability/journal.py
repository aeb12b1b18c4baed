"""What an accepted request needs to outlive the router's process, written while it runs.

The event loop never waits for the disk: what is to be written gathers, and goes to the journal's own thread in one
transaction as soon as the one before is done. A token is shown to callers only when it is in the file, so a router that
comes back after a crash knows every token that anyone has seen.

A disk that fails, or hangs, costs the journal and no answer. Then what is in the file holds no longer: requests go on
without it, and a router that read it would compute finished ones again, and go on with others from fewer tokens than
their callers have. So the file is deleted, and a new one is begun as soon as the disk lets us.

A router that starts on such a disk serves all the same, and nothing goes on of what it could not read by then: who
came back meanwhile was begun again without the file.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from stagecoach.errors import InternalError
from stagecoach_router.durability.journal_file import Identity, is_of_the_disk
from stagecoach_router.durability.journal_store import (
    MAX_READ_S,
    Begin,
    End,
    Entry,
    Forget,
    JournaledRequest,
    JournalStore,
    Token,
)
from stagecoach_router.durability.retention import MAX_AGE_S
from stagecoach_router.requests.completion import OutputDelta
from stagecoach_router.requests.request import RequestKey
from stagecoach_router.requests.request_state import RequestState

Result = TypeVar("Result")

# A disk that takes longer for a transaction hangs, as far as callers can tell, whose answers wait for it.
MAX_WRITE_S = 10.0
# As long as callers wait at the start of a router for a disk that hangs: for the file to be opened, and to be read.
MAX_START_S = 2 * MAX_READ_S
# After a failure, until it is tried to begin a new file, and between two such attempts.
RETRY_INTERVAL_S = 10.0

logger = logging.getLogger(__name__)


class Journal:
    """One router's journal. `open` and `load` it before use. After `close` it writes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._fingerprint = ""  # of the model
        self._opening: asyncio.Future[JournalStore] | None = None  # the first time; over but where the disk hangs
        self._store: JournalStore | None = None  # None while the disk fails
        self._entries: list[Entry] = []  # for the next transaction
        self._shows: dict[RequestState, int] = {}  # how many deltas that lets be shown
        self._writing: asyncio.Task[None] | None = None
        self._beginning_anew: asyncio.Task[None] | None = None
        self._hangs = False  # what the thread was told to do took too long, and is not done yet
        self._closed = asyncio.Event()

    async def open(self) -> None:
        """Raises ConfigError for a file that is none of ours, and nothing for a disk that fails."""
        self._opening = asyncio.ensure_future(self._in_thread(lambda: JournalStore(self._path)))
        try:
            self._store = await self._in_time(self._opening, MAX_START_S)
        except (sqlite3.Error, OSError) as error:
            self._say_that_it_failed(error)

    @property
    def former_fingerprint(self) -> str:
        """Of the model that the file was of when it was opened; "": of none, or that is not known."""
        return "" if self._store is None else self._store.former_fingerprint

    async def load(self, fingerprint: str) -> list[JournaledRequest]:
        """What a former process left, in the order in which it was accepted; nothing where the disk fails.

        Raises ConfigError for another model's journal, and for a damaged one.
        """
        assert self._opening is not None, "load before open"
        self._fingerprint = fingerprint
        store = self._store
        if store is None:
            self._begin_anew_later(None)
            return []
        try:
            return await self._in_time(self._in_thread(lambda: _load(store, fingerprint)), MAX_START_S)
        except (sqlite3.Error, OSError) as error:
            self._say_that_it_failed(error)
            self._begin_anew_later(store)
            return []

    def begin(self, state: RequestState) -> None:
        """A request was accepted, or taken over from a former process: from now on its deltas go through here."""
        store = self._store
        if store is None:
            return
        num_tokens = [completion.num_tokens for completion in state.completions]

        def tap(delta: OutputDelta) -> None:
            if state.ended:  # it failed, and was forgotten: what is written now would be left over in the file
                return
            if self._store is not store:  # that disk has failed: better an answer that does not outlive us than none
                state.show(1)
                return
            if self._closed.is_set():  # not in the file: the next process will compute it, and show it
                return
            self._shows[state] = self._shows.get(state, 0) + 1
            if delta.sampled is not None:
                self._write(Token(state.key, delta.index, num_tokens[delta.index], delta.sampled))
                num_tokens[delta.index] += 1
            if delta.finish_reason is not None and state.request.cut_short:  # a replay of its tokens finds no end
                self._write(Begin(state.key, state.digest, state.request))

        state.tap = tap
        self._write(Begin(state.key, state.digest, state.request))

    def end(self, key: RequestKey) -> None:
        """A request has finished; it is kept for a while, for a caller who comes back for its output."""
        self._write(End(key, time.time()))

    def forget(self, key: RequestKey) -> None:
        """A request has failed, or was kept for long enough: nothing of it is needed any more."""
        self._write(Forget(key))

    async def close(self) -> None:
        """Writes what is left. What is told later is not written, so the next process finds what runs now.

        It takes as long as the disk for two transactions, and MAX_WRITE_S for a disk that hangs, which is left alone.
        """
        self._closed.set()
        if self._writing is not None:
            await self._writing
        if self._beginning_anew is not None and not self._hangs:
            await asyncio.wait([self._beginning_anew], timeout=MAX_WRITE_S)
        if self._beginning_anew is not None:
            self._beginning_anew.cancel()
        elif self._store is not None:
            try:
                await self._in_time(self._in_thread(self._store.close), MAX_WRITE_S)
            except Exception as error:  # what was written before is there or not: nobody can do anything about it now
                logger.error("journal: %s could not be closed: %s", self._path, error)
        self._thread.shutdown(wait=False)

    def _write(self, entry: Entry) -> None:
        if self._store is not None and not self._closed.is_set():
            self._entries.append(entry)
            if self._writing is None:
                self._writing = asyncio.get_running_loop().create_task(self._write_all())

    async def _write_all(self) -> None:
        try:
            while self._entries and self._store is not None:
                await self._transact(self._store)
        finally:  # else nothing would be written any more, nor shown
            self._writing = None

    async def _transact(self, store: JournalStore) -> None:
        entries, self._entries = self._entries, []
        shows, self._shows = self._shows, {}
        try:
            await self._in_time(self._in_thread(lambda: store.apply(entries)), MAX_WRITE_S)
        except Exception as error:  # the disk's, or a bug's: without this, answers would be held back for ever
            self._say_that_it_failed(error)
            self._entries.clear()
            for state, num_deltas in self._shows.items():  # what came meanwhile
                shows[state] = shows.get(state, 0) + num_deltas
            self._shows.clear()
            self._begin_anew_later(store)
        for state, num_deltas in shows.items():
            _show(state, num_deltas)

    def _say_that_it_failed(self, error: Exception) -> None:
        logger.error(
            "journal: %s: %s: requests will not outlive this process, until the disk works again", self._path, error
        )

    def _begin_anew_later(self, former: JournalStore | None) -> None:
        self._store = None
        self._beginning_anew = asyncio.get_running_loop().create_task(self._begin_anew(former))

    async def _begin_anew(self, former: JournalStore | None) -> None:
        """Deletes the file, and begins another as soon as the disk works. A disk that hangs is waited for.

        `former` is None for a file that was not opened in time.
        """
        if former is None and self._opening is not None:
            with suppress(Exception):
                former = await self._opening
        identity = None if former is None else former.identity
        try:
            if former is not None:
                await self._in_thread(former.discard)
        except Exception as error:
            logger.error("journal: %s cannot be deleted, and what is in it holds no longer: %s", self._path, error)
        while self._store is None and not await self._is_closed_within(RETRY_INTERVAL_S):
            try:
                self._store = await self._in_thread(lambda: self._open_empty(identity))
            except Exception as error:
                logger.debug("journal: %s: still not: %s", self._path, error)
            else:
                logger.warning(
                    "journal: %s: requests that are accepted from now on outlive this process again", self._path
                )
        self._beginning_anew = None

    async def _is_closed_within(self, timeout_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._closed.wait()
        return self._closed.is_set()

    def _open_empty(self, former: Identity | None) -> JournalStore:
        store = JournalStore(self._path)
        try:
            store.check_model(self._fingerprint)  # first: another model's requests are not ours to delete
            store.begin_anew(former)
        except BaseException:
            with suppress(Exception):
                store.close()
            raise
        return store

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _in_time(self, work: Awaitable[Result], max_s: float) -> Result:
        """What comes of the thread's work. Raises TimeoutError where it takes too long; it ends later, or never."""
        done = asyncio.ensure_future(work)
        done.add_done_callback(lambda done: done.cancelled() or done.exception())  # when nobody waits any more
        try:
            async with asyncio.timeout(max_s):
                return await asyncio.shield(done)
        except TimeoutError:
            self._hangs = not done.done()
            done.add_done_callback(self._came_back)
            raise TimeoutError(f"the disk has not answered in {max_s:g} s") from None

    def _came_back(self, _: asyncio.Future[Result]) -> None:
        self._hangs = False


def _load(store: JournalStore, fingerprint: str) -> list[JournaledRequest]:
    store.check_model(fingerprint)
    finished_since_s = time.time() - MAX_AGE_S
    try:
        store.drop_finished_before(finished_since_s)
    except sqlite3.Error as error:  # only to save room: the file can be read on a full disk, too
        if not is_of_the_disk(error):
            raise
        logger.warning("journal: what is old could not be deleted: %s", error)
    return store.load(finished_since_s)


def _show(state: RequestState, num_deltas: int) -> None:
    """Shows them. An error that nobody foresaw costs this request, and none of the others that wait for the disk."""
    try:
        state.show(num_deltas)
    except Exception as error:
        logger.exception("showing tokens of request %s", state.request.request_id)
        try:
            state.fail(InternalError(f"showing tokens: {error!r}"))
        except Exception:
            logger.exception("failing request %s", state.request.request_id)

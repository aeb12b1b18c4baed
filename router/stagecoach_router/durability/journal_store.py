"""The journal's file: accepted requests and their tokens so far, in SQLite. Synchronous; for one thread at a time.

In write-ahead mode with `synchronous=NORMAL` a transaction that was committed survives the death of the process; the
last ones may be lost with the machine's power. The file holds prompts and answers, so only its owner may read it.

The write-ahead log is moved into the database by us: SQLite would do it unasked, and say nothing where that fails.
After a failed fsync the system may have dropped what was written before, so it is an error like that of a write.

A file is ours if its schema is, to the letter: views, triggers and whatever else SQLite would run are not in it. Every
page is looked at before a row is read, as a tree whose branches meet again could take for ever; SQLite reads its own
schema before that, so there is a limit in time, too. What is read takes memory in proportion to the file.
"""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stagecoach.errors import ConfigError, InvalidArgument
from stagecoach_router.durability.journal_file import (
    Identity,
    delete,
    identity_of,
    is_of_the_disk,
    log_of,
    make_private,
)
from stagecoach_router.durability.journal_records import (
    check_past,
    read_request,
    read_sampled,
    write_logprobs,
    write_request,
)
from stagecoach_router.requests.request import Request, RequestKey, check_params, check_prompt
from stagecoach_router.sampling.outputs import Sampled

FORMAT = "1"
# For a file that another process has open; one that died gives it back at once.
LOCK_TIMEOUT_S = 1.0
# Of one value in the file. A prompt comes in a message of 4 MiB, in which a token takes a byte or more, and here ten.
MAX_VALUE_BYTES = 64 << 20
# For opening the file, and for reading what is in it.
MAX_READ_S = 60.0
# Of the write-ahead log, before it is moved into the database.
MAX_LOG_BYTES = 4 << 20
# Of SQLite's machine, between two looks at the clock.
_STEPS_BETWEEN_LOOKS = 100_000

# The second where SQLite quotes what is no text in a message of its own.
_NOT_READABLE = (sqlite3.Error, UnicodeDecodeError)

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE requests (
    owner TEXT NOT NULL, request_id TEXT NOT NULL,  -- the key
    digest BLOB NOT NULL, content TEXT NOT NULL, cache_salt BLOB NOT NULL,
    finished_s REAL,  -- Unix time; NULL while it runs
    PRIMARY KEY (owner, request_id)
);
CREATE TABLE tokens (
    owner TEXT NOT NULL, request_id TEXT NOT NULL, completion INTEGER NOT NULL, position INTEGER NOT NULL,
    token_id INTEGER NOT NULL, logprobs TEXT,
    PRIMARY KEY (owner, request_id, completion, position)
) WITHOUT ROWID;
"""


class Begin(NamedTuple):
    """A request was accepted, or is another by now: one that names no limit may have been cut short."""

    key: RequestKey
    digest: bytes
    request: Request


class Token(NamedTuple):
    """A completion has one token more, its `position`-th."""

    key: RequestKey
    completion: int
    position: int
    sampled: Sampled


class End(NamedTuple):
    """A request is finished."""

    key: RequestKey
    finished_s: float  # Unix time


class Forget(NamedTuple):
    """Nothing of a request is needed any more."""

    key: RequestKey


Entry = Begin | Token | End | Forget


@dataclass(frozen=True, slots=True)
class JournaledRequest:
    """What the journal holds of one request. `past`: its tokens, by completion."""

    key: RequestKey
    digest: bytes
    request: Request
    past: list[list[Sampled]] = field(repr=False)

    def check(self, *, vocab_size: int, context_length: int) -> None:
        """Raises InvalidArgument or OutOfRange where this can be no request of the model that is served."""
        request = self.request
        check_prompt(request.prompt_tokens, vocab_size=vocab_size, context_length=context_length)
        check_params(request.params, vocab_size=vocab_size)
        if request.params.seed is None:
            raise InvalidArgument("seed: it was accepted without one", field="seed")
        check_past(self.past, request, vocab_size=vocab_size)


# Name, type, table and statement of what a database has.
_Schema = list[tuple[object, ...]]


class JournalStore:
    """An open journal. Raises ConfigError where the file is none of ours, or another router has it open.

    Here as in all that reads, what the disk says when it fails is raised as it is: sqlite3.Error or OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            make_private(path)
            self._db = sqlite3.connect(path, LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            if is_of_the_disk(error):
                raise
            raise ConfigError(f"journal: {path}: {error}", field="journal", value=path) from error
        try:
            with self._reading("is no journal"):
                self._prepare()
            self._files = self._identities()
        except Exception as error:
            with suppress(sqlite3.Error):
                self._db.close()
            if isinstance(error, OSError) and not is_of_the_disk(error):
                raise ConfigError(f"journal: {path}: {error}", field="journal", value=path) from error
            raise

    def _prepare(self) -> None:
        execute = self._db.execute
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        execute("PRAGMA locking_mode = EXCLUSIVE")  # until we close it or die; before the first access
        theirs = _schema_of(self._db)
        if theirs:  # nothing is changed in a file that is not ours
            self._check_schema(theirs)
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        execute("PRAGMA wal_autocheckpoint = 0")
        if not theirs:
            self._db.executescript(f"BEGIN;{_SCHEMA}INSERT INTO meta VALUES ('format', '{FORMAT}');COMMIT;")
        execute("BEGIN IMMEDIATE")  # takes the lock now
        execute("COMMIT")
        self.former_fingerprint = str(dict(execute("SELECT * FROM meta")).get("model", ""))  # "": of no model yet

    def _check_schema(self, theirs: _Schema) -> None:
        with closing(sqlite3.connect(":memory:")) as new:
            new.executescript(_SCHEMA)
            ours = _schema_of(new)
        if ours[0] not in theirs:  # that is `meta`, which says the format
            raise self._error("is no journal: it has other tables")
        health = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if health != "ok":
            raise self._error(f"is damaged: {health}")
        self._check("format", FORMAT, "this router's")
        if theirs != ours:
            raise self._error("is no journal: it has other tables")

    def check_model(self, fingerprint: str) -> None:
        """Raises ConfigError for a journal of another model than this. A new one becomes this model's."""
        with self._reading():
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('model', ?)", (fingerprint,))
            self._check("model", fingerprint, "the shards'")

    def apply(self, entries: Iterable[Entry]) -> None:
        """Writes them in order. Raises sqlite3.Error where the disk fails; what the file then holds can be anything.

        Raises OSError where the file is no longer what its path leads to: SQLite would go on writing into a file that
        was deleted or moved away, and that no later process finds.
        """
        if self._identities() != self._files:
            raise OSError(errno.ESTALE, "another file has this name now, or none has", str(self._path))
        with self._db:
            self._db.execute("BEGIN")
            for entry in entries:
                self._apply(entry)
        if log_of(self._path).stat().st_size > MAX_LOG_BYTES:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def drop_finished_before(self, finished_s: float) -> None:
        """Forgets requests that were finished before that Unix time. Raises ConfigError for a damaged file."""
        old = "SELECT owner, request_id FROM requests WHERE finished_s < ?"
        with self._reading(), self._db:
            self._db.execute("BEGIN")
            self._db.execute(f"DELETE FROM tokens WHERE (owner, request_id) IN ({old})", (finished_s,))
            self._db.execute("DELETE FROM requests WHERE finished_s < ?", (finished_s,))

    def load(self, finished_since_s: float = 0.0) -> list[JournaledRequest]:
        """Every request that runs or was finished since that Unix time, in the order in which they were accepted.

        Raises ConfigError for a damaged file.
        """
        which = "finished_s IS NULL OR finished_s >= ?"
        select = f"SELECT owner, request_id, digest, content, cache_salt FROM requests WHERE {which} ORDER BY rowid"
        # A cursor that is left open would keep the file locked.
        with self._reading(), closing(self._db.execute(select, (finished_since_s,))) as rows:
            return [self._read(*row) for row in rows]

    def close(self) -> None:
        """Gives the file back."""
        self._db.close()

    def discard(self) -> None:
        """Closes the file and deletes it. Raises OSError."""
        with suppress(sqlite3.Error):  # as on a full disk; the file is closed all the same
            self._db.close()
        delete(self._path, self.identity)

    def begin_anew(self, former: Identity | None) -> None:
        """Makes this an empty journal, where it is the file that was `former`, or a new one; with None, any that is.

        Raises ConfigError where it is another one that holds requests, and sqlite3.Error where the disk still fails.
        """
        if (
            former is not None
            and self.identity != former
            and self._db.execute("SELECT 1 FROM requests").fetchone() is not None
        ):
            raise self._error("is another journal now, and holds requests")
        with self._db:
            self._db.execute("BEGIN")
            for table in ("tokens", "requests"):
                self._db.execute(f"DELETE FROM {table}")

    @property
    def identity(self) -> Identity:
        """Which file it is."""
        return self._files[0]

    def _identities(self) -> list[Identity]:
        """Which files the database and its write-ahead log are. Raises OSError for one missing."""
        return [identity_of(self._path), identity_of(log_of(self._path))]

    def _check(self, name: str, ours: str, whose: str) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        theirs = "none" if row is None else row[0]
        if theirs != ours:
            raise ConfigError(
                f"journal: {self._path} is of {name} {theirs}, not {whose} {ours}: give another file or delete this",
                field="journal",
                limit=ours,
                value=theirs,
            )

    def _apply(self, entry: Entry) -> None:
        execute = self._db.execute
        if isinstance(entry, Token):
            sampled = entry.sampled
            values = (*entry.key, entry.completion, entry.position, sampled.token_id, write_logprobs(sampled))
            execute("INSERT OR IGNORE INTO tokens VALUES (?, ?, ?, ?, ?, ?)", values)
        elif isinstance(entry, Begin):
            content = write_request(entry.request)
            inserted = execute(
                "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, NULL)",
                (*entry.key, entry.digest, content, entry.request.cache_salt),
            )
            if inserted.rowcount:  # it is new, so no token can be its own
                execute("DELETE FROM tokens WHERE owner = ? AND request_id = ?", entry.key)
            else:
                execute("UPDATE requests SET content = ? WHERE owner = ? AND request_id = ?", (content, *entry.key))
        elif isinstance(entry, End):
            execute(
                "UPDATE requests SET finished_s = ? WHERE owner = ? AND request_id = ? AND finished_s IS NULL",
                (entry.finished_s, *entry.key),
            )
        else:
            execute("DELETE FROM tokens WHERE owner = ? AND request_id = ?", entry.key)
            execute("DELETE FROM requests WHERE owner = ? AND request_id = ?", entry.key)

    def _read(
        self, owner: object, request_id: object, digest: object, content: object, cache_salt: object
    ) -> JournaledRequest:
        if not isinstance(owner, str) or not isinstance(digest, bytes):
            raise InvalidArgument("owner: not text, or a digest that is not bytes", field="owner")
        request = read_request(request_id, content, cache_salt)
        key = (owner, request.request_id)
        return JournaledRequest(key, digest, request, self._tokens(key, request.params.n))

    def _tokens(self, key: RequestKey, num_completions: int) -> list[list[Sampled]]:
        past: list[list[Sampled]] = [[] for _ in range(num_completions)]
        select = (
            "SELECT completion, position, token_id, logprobs FROM tokens WHERE owner = ? AND request_id = ? "
            "ORDER BY completion, position"
        )
        with closing(self._db.execute(select, key)) as rows:
            for completion, position, token_id, logprobs in rows:
                known = isinstance(completion, int) and 0 <= completion < num_completions
                if not known or position != len(past[completion]):
                    raise InvalidArgument("tokens: they do not follow each other", field="tokens")
                past[completion].append(read_sampled(token_id, logprobs))
        return past

    @contextmanager
    def _reading(self, failed: str = "cannot be used") -> Iterator[None]:
        """Raises ConfigError for what is wrong with the file, as if it cannot be read within MAX_READ_S."""
        end_s = time.monotonic() + MAX_READ_S
        self._db.set_progress_handler(lambda: time.monotonic() > end_s, _STEPS_BETWEEN_LOOKS)
        try:
            yield
        except (*_NOT_READABLE, InvalidArgument) as error:
            if is_of_the_disk(error):
                raise
            # Python's own errors of this class, as for text that is none, have no code.
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_BUSY:
                text = f"journal: {self._path} is in use: has another router opened it?"
                raise ConfigError(text, field="journal", value=self._path) from error
            why = f"not read in {MAX_READ_S:g} s" if code == sqlite3.SQLITE_INTERRUPT else error
            raise self._error(f"{failed}: {why}") from error
        finally:
            self._db.set_progress_handler(None, 0)

    def _error(self, text: str) -> ConfigError:
        text = f"journal: {self._path} {text}: give another file or delete this"
        return ConfigError(text, field="journal", value=self._path)


def _schema_of(db: sqlite3.Connection) -> _Schema:
    """What a database has, in the order in which it was made; of a longer schema only the beginning."""
    with closing(db.execute("SELECT name, type, tbl_name, sql FROM sqlite_master LIMIT 9")) as rows:
        return rows.fetchall()

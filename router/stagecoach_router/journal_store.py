"""The journal's file: accepted requests and their tokens so far, in SQLite. Synchronous; for one thread at a time.

In write-ahead mode with `synchronous=NORMAL` a transaction that was committed survives the death of the process; the
last ones may be lost with the machine's power. The file holds prompts and answers, so only its owner may read it.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from stagecoach.errors import ConfigError
from stagecoach.sampling import SamplingParams
from stagecoach_router.outputs import Sampled
from stagecoach_router.request import Request, RequestKey

FORMAT = "1"
# For a file that another process has open; one that died gives it back at once.
LOCK_TIMEOUT_S = 1.0

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
    """A request was accepted."""

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
    """A request is of no use any more."""

    key: RequestKey


Entry = Begin | Token | End | Forget


@dataclass(frozen=True, slots=True)
class JournaledRequest:
    """What the journal holds of one request. `past`: its tokens, by completion."""

    key: RequestKey
    digest: bytes
    request: Request
    past: list[list[Sampled]] = field(repr=False)


class JournalStore:
    """An open journal. Raises ConfigError where the file is none of ours, or another router has it open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"journal: {path}: {error}", field="journal", value=path) from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._db.close()
            locked = error.sqlite_errorcode == sqlite3.SQLITE_BUSY
            what = "is in use: has another router opened it?" if locked else f"is no journal: {error}"
            raise ConfigError(f"journal: {path} {what}", field="journal", value=path) from error
        except ConfigError:
            self._db.close()
            raise

    def _prepare(self) -> None:
        execute = self._db.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")  # until we close it or die; before the first access
        is_new = execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not is_new:  # nothing is changed in a file that is not ours
            self._check("format", FORMAT, "this router's")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        if is_new:
            self._db.executescript(f"BEGIN;{_SCHEMA}INSERT INTO meta VALUES ('format', '{FORMAT}');COMMIT;")
        execute("BEGIN IMMEDIATE")  # takes the lock now
        execute("COMMIT")

    def check_model(self, fingerprint: str) -> None:
        """Raises ConfigError for a journal of another model than this. A new one becomes this model's."""
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('model', ?)", (fingerprint,))
        self._check("model", fingerprint, "the shards'")

    def apply(self, entries: Iterable[Entry]) -> None:
        """Writes them in order, all or, where it raises sqlite3.Error, none."""
        with self._db:
            self._db.execute("BEGIN")
            for entry in entries:
                self._apply(entry)

    def drop_finished_before(self, finished_s: float) -> None:
        """Forgets requests that were finished before that Unix time."""
        old = "SELECT owner, request_id FROM requests WHERE finished_s < ?"
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute(f"DELETE FROM tokens WHERE (owner, request_id) IN ({old})", (finished_s,))
            self._db.execute("DELETE FROM requests WHERE finished_s < ?", (finished_s,))

    def load(self) -> list[JournaledRequest]:
        """Every request that is known, in the order in which they were accepted."""
        select = "SELECT owner, request_id, digest, content, cache_salt FROM requests ORDER BY rowid"
        loaded = []
        for owner, request_id, digest, content, cache_salt in self._db.execute(select).fetchall():
            request = _read_request(request_id, content, cache_salt)
            past = self._tokens((owner, request_id), request.params.n)
            loaded.append(JournaledRequest((owner, request_id), digest, request, past))
        return loaded

    def close(self) -> None:
        """Gives the file back."""
        self._db.close()

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
            logprobs = None
            if entry.sampled.logprob is not None:
                logprobs = json.dumps([entry.sampled.logprob, entry.sampled.top])
            values = (*entry.key, entry.completion, entry.position, entry.sampled.token_id, logprobs)
            execute("INSERT OR IGNORE INTO tokens VALUES (?, ?, ?, ?, ?, ?)", values)
        elif isinstance(entry, Begin):
            content = _write_request(entry.request)
            execute(
                "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, NULL)",
                (*entry.key, entry.digest, content, entry.request.cache_salt),
            )
        elif isinstance(entry, End):
            execute(
                "UPDATE requests SET finished_s = ? WHERE owner = ? AND request_id = ? AND finished_s IS NULL",
                (entry.finished_s, *entry.key),
            )
        else:
            execute("DELETE FROM tokens WHERE owner = ? AND request_id = ?", entry.key)
            execute("DELETE FROM requests WHERE owner = ? AND request_id = ?", entry.key)

    def _tokens(self, key: RequestKey, num_completions: int) -> list[list[Sampled]]:
        past: list[list[Sampled]] = [[] for _ in range(num_completions)]
        rows = self._db.execute(
            "SELECT completion, token_id, logprobs FROM tokens WHERE owner = ? AND request_id = ? "
            "ORDER BY completion, position",
            key,
        )
        for completion, token_id, logprobs in rows:
            logprob, top = (None, ()) if logprobs is None else json.loads(logprobs)
            past[completion].append(Sampled(token_id, logprob, tuple((other, value) for other, value in top)))
        return past


def _write_request(request: Request) -> str:
    params = asdict(request.params)
    # JSON's keys are strings, and its numbers may be read as floats by others: pairs keep the ids what they are.
    params["logit_bias"] = list(request.params.logit_bias.items())
    return json.dumps({"prompt_tokens": request.prompt_tokens, "params": params, "priority": request.priority})


def _read_request(request_id: str, content: str, cache_salt: bytes) -> Request:
    values = json.loads(content)
    params = values["params"]
    params["logit_bias"] = dict(params["logit_bias"])
    for name in ("stop", "stop_token_ids"):
        params[name] = tuple(params[name])
    return Request(
        request_id=request_id,
        prompt_tokens=tuple(values["prompt_tokens"]),
        params=SamplingParams(**params),
        priority=values["priority"],
        cache_salt=cache_salt,
    )

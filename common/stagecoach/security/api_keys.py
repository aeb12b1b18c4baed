"""API keys: what one looks like, what is kept of it, and the file that says what each may do.

The file is TOML. It holds no key, only what is needed to recognise one:

    [[keys]]
    name = "billing"
    id = "3f9a0c5d7e1b2846"
    sha256 = "<64 hexadecimal digits>"
    requests_per_minute = 60     # this and what follows may be left out: no limit
    tokens_per_minute = 100000
    max_concurrent = 8
    models = ["smollm2-135m-instruct"]
    max_priority = 0
    shares_cache = true          # left out: false

Entries of one name are one tenant with several keys, so that a key can be changed without a gap; their limits must be
the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from stagecoach.errors import ConfigError

MAX_PER_MINUTE = 10**9
MAX_CONCURRENT = 10**6
_MIN_INT32, _MAX_INT32 = -(2**31), 2**31 - 1

# The id is in the open and only says which entry to compare with; the secret part has 256 random bits.
_KEY = re.compile(r"sc_(?P<id>[0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_ID = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a tenant may do. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and outputs together
    max_concurrent: int | None = None  # sequences at a time: a request with n completions counts n times
    models: tuple[str, ...] | None = None
    max_priority: int | None = None
    shares_cache: bool = False  # the prefix cache, with all others who do


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key of the file."""

    name: str
    id: str
    sha256: str = field(repr=False)
    grant: Grant = Grant()


def new_key() -> str:
    """A new key. It is shown once, and an entry of the file keeps only its id and digest."""
    return f"sc_{secrets.token_hex(8)}_{secrets.token_urlsafe(32)}"


def key_id(key: str) -> str | None:
    """The part of a key that says which entry it belongs to. None for text that is no key."""
    match = _KEY.fullmatch(key)
    return None if match is None else match["id"]


def key_sha256(key: str) -> str:
    """What is kept of a key, in hexadecimal.

    One fast hash is enough: a slow one makes guessing dearer, and 256 random bits cannot be guessed at any price.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def new_entry(key: str, name: str, grant: Grant) -> KeyEntry:
    """The entry of a key from `new_key`."""
    known = key_id(key)
    assert known is not None, "made by new_key"
    return KeyEntry(name, known, key_sha256(key), grant)


def read_entries(text: str) -> tuple[KeyEntry, ...]:
    """The entries of a key file. Raises ConfigError with the entry and the field; values are not quoted."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise ConfigError(f"keys: not TOML: {error}", field="keys") from error
    tables = values.get("keys", [])
    if values.keys() - {"keys"} or not isinstance(tables, list):
        raise ConfigError("keys: the file may hold [[keys]] entries, and nothing else", field="keys")
    entries = tuple(_entry(table, f"keys[{index}]") for index, table in enumerate(tables))
    grants: dict[str, Grant] = {}
    ids: set[str] = set()
    for index, entry in enumerate(entries):
        if entry.id in ids:
            raise ConfigError(f"keys[{index}].id: {entry.id} is there twice", field=f"keys[{index}].id")
        ids.add(entry.id)
        if grants.setdefault(entry.name, entry.grant) != entry.grant:
            text = f"keys[{index}]: the limits differ from those of an earlier key of {entry.name}"
            raise ConfigError(text, field=f"keys[{index}]", value=entry.name)
    return entries


def write_entry(entry: KeyEntry) -> str:
    """The entry as text, to be appended to a file. `read_entries` reads it back."""
    lines = ["[[keys]]"]
    for name in ("name", "id", "sha256"):
        lines.append(f'{name} = "{getattr(entry, name)}"')
    for limit in fields(Grant):
        value = getattr(entry.grant, limit.name)
        if value != limit.default:
            lines.append(f"{limit.name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def check_grant(grant: Grant, where: str) -> Grant:
    """Returns `grant`, or raises ConfigError for a field with an impossible value. `where` is put before its name."""
    _whole(grant.requests_per_minute, f"{where}requests_per_minute", 1, MAX_PER_MINUTE)
    _whole(grant.tokens_per_minute, f"{where}tokens_per_minute", 1, MAX_PER_MINUTE)
    _whole(grant.max_concurrent, f"{where}max_concurrent", 1, MAX_CONCURRENT)
    _whole(grant.max_priority, f"{where}max_priority", _MIN_INT32, _MAX_INT32)
    if grant.models is not None and not all(isinstance(each, str) and each.isprintable() for each in grant.models):
        raise ConfigError(f"{where}models: a list of names", field=f"{where}models", limit="names")
    if not isinstance(grant.shares_cache, bool):
        raise ConfigError(f"{where}shares_cache: true or false", field=f"{where}shares_cache", limit="true, false")
    return grant


def check_name(name: object, where: str) -> str:
    """Returns `name`, or raises ConfigError where it is not letters, digits and . _ -, or has a key in it."""
    if isinstance(name, str) and _KEY.search(name):
        raise ConfigError(f"{where}name: that is a key; names are in logs and errors", field=f"{where}name")
    return _text(name, _NAME, f"{where}name", "1 to 64 letters, digits and . _ -, the first a letter or digit")


def _entry(table: object, where: str) -> KeyEntry:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: not a table", field=where)
    values: dict[str, Any] = dict(table)
    name = check_name(values.pop("name", None), f"{where}.")
    known = _text(values.pop("id", None), _ID, f"{where}.id", "16 hexadecimal digits, as the command printed them")
    sha256 = _text(values.pop("sha256", None), _SHA256, f"{where}.sha256", "64 hexadecimal digits, and never a key")
    unknown = sorted(values.keys() - {limit.name for limit in fields(Grant)})
    if unknown:
        text = f"{where}: no such field; it may have {', '.join(limit.name for limit in fields(Grant))}"
        raise ConfigError(text, field=where, value=len(unknown))
    models = values.pop("models", None)
    if models is not None and not isinstance(models, list):
        raise ConfigError(f"{where}.models: a list of names", field=f"{where}.models", limit="names")
    grant = Grant(models=None if models is None else tuple(models), **values)
    return KeyEntry(name, known, sha256, check_grant(grant, f"{where}."))


def _text(value: object, pattern: re.Pattern[str], field: str, limit: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ConfigError(f"{field}: {limit}", field=field, limit=limit)
    return value


def _whole(value: object, field: str, low: int, high: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
        limit = f"[{low}, {high}]"
        raise ConfigError(f"{field}: a whole number in {limit}", field=field, limit=limit)

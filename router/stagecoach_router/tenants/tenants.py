"""Who calls, what they may do, and how much of it they have used. Pure: the clock's reading comes in."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from stagecoach.errors import PermissionDenied, RateLimited, Unauthenticated
from stagecoach.security.api_keys import Grant, KeyEntry, key_id, key_sha256
from stagecoach_router.tenants.rate_limit import TokenBucket

AUTHORIZATION = "authorization"
# When one of a caller's requests will end is not known; soon, as a rule.
CONCURRENCY_RETRY_AFTER_S = 1.0
# Compared with where there is no such id, so that this takes as long as a wrong key does.
_NO_SHA256 = "0" * 64


class Visit:
    """A request that was let in. It counts as running until `end`: that of the `with` statement, unless it is kept."""

    def __init__(self, caller: Tenant, num_charged: int = 0) -> None:
        self._caller = caller
        self._num_charged = num_charged  # tokens
        self._kept = False
        self._ended = False
        caller.num_running += 1

    @property
    def is_metered(self) -> bool:
        """Whether its tokens are counted."""
        return self._caller.tokens is not None

    def charge_up_to(self, num_tokens: int, now_s: float) -> None:
        """The tokens of prompt and output so far. Those that were charged before are not charged again."""
        if self._caller.tokens is not None and num_tokens > self._num_charged:
            self._caller.tokens.take(num_tokens - self._num_charged, now_s)
        self._num_charged = max(self._num_charged, num_tokens)

    def keep(self) -> None:
        """The request runs on after the `with` statement; somebody else calls `end`."""
        self._kept = True

    def end(self) -> None:
        """The request does not run any more. Again is harmless."""
        if not self._ended:
            self._ended = True
            self._caller.num_running -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._kept:
            self.end()


class Tenant:
    """One name of the key file; "" is everyone where there is no file."""

    def __init__(self, name: str, grant: Grant, now_s: float) -> None:
        self.name = name
        self.grant = grant
        self.num_running = 0
        self.requests = _bucket(None, grant.requests_per_minute, now_s)
        self.tokens = _bucket(None, grant.tokens_per_minute, now_s)

    def change(self, grant: Grant, now_s: float) -> None:
        """Other limits from now on; what was used stays used."""
        self.requests = _bucket(self.requests, grant.requests_per_minute, now_s)
        self.tokens = _bucket(self.tokens, grant.tokens_per_minute, now_s)
        self.grant = grant

    def check_model(self, model: str) -> None:
        """Raises PermissionDenied. A name that is not served is refused like any other."""
        if not self.may_use(model):
            raise PermissionDenied(f"model: {self.name} may not use {model!r}", field="model", value=model)

    def may_use(self, model: str) -> bool:
        """Whether this model is among the caller's."""
        return self.grant.models is None or model in self.grant.models

    def check_priority(self, priority: int) -> None:
        """Raises PermissionDenied."""
        limit = self.grant.max_priority
        if limit is not None and priority > limit:
            raise PermissionDenied(
                f"priority: {priority}; {self.name} may ask for {limit} at most",
                field="priority",
                limit=limit,
                value=priority,
            )

    def admit(self, now_s: float) -> Visit:
        """Lets a request in, and takes it off the requests of the minute. Raises RateLimited, and then takes nothing.

        To be used in a `with` statement. The error's `retry_after_s` is when the request would be let in, if the caller
        sent nothing else until then.
        """
        limit = self.grant.max_concurrent
        if limit is not None and self.num_running >= limit:
            raise RateLimited(
                f"{self.num_running} requests of {self.name} are running; {limit} may",
                field="max_concurrent",
                limit=limit,
                value=self.num_running,
                retry_after_s=CONCURRENCY_RETRY_AFTER_S,
            )
        waits = {
            "tokens_per_minute": 0.0 if self.tokens is None else self.tokens.wait_s(now_s),
            "requests_per_minute": 0.0 if self.requests is None else self.requests.wait_s(now_s),
        }
        field, wait_s = max(waits.items(), key=lambda item: item[1])
        if wait_s > 0:
            raise RateLimited(
                f"{self.name} has used up its {field.replace('_', ' ')}; again in {wait_s:.1f} s",
                field=field,
                limit=getattr(self.grant, field),
                retry_after_s=wait_s,
            )
        if self.requests is not None:
            self.requests.take(1, now_s)
        return Visit(self)

    def cache_salt(self, chosen: str) -> bytes:
        """What parts the caller's blocks in the prefix cache from others', and by `chosen` its own from each other.

        Different (name, chosen) give different salts: the name's length comes first, so that no choice of one caller
        spells another's name.
        """
        name = "" if self.grant.shares_cache else self.name
        if not name and not chosen:
            return b""
        return len(name.encode()).to_bytes(4, "little") + name.encode() + chosen.encode()


class Tenants:
    """All callers. Without `entries`, everyone is the same one, who may do anything."""

    def __init__(self, entries: Sequence[KeyEntry] | None, now_s: float) -> None:
        self._anyone = Tenant("", Grant(), now_s) if entries is None else None
        self._by_name: dict[str, Tenant] = {}
        self._by_id: dict[str, KeyEntry] = {}
        if entries is not None:
            self.replace(entries, now_s)

    def replace(self, entries: Sequence[KeyEntry], now_s: float) -> None:
        """The key file has changed. Who stays keeps what was used; requests of who is gone run to their end."""
        assert self._anyone is None, "there is no file"
        former = self._by_name
        self._by_name, self._by_id = {}, {}
        for entry in entries:
            self._by_id[entry.id] = entry
            if entry.name in self._by_name:
                continue  # another key of the same caller, with the same limits
            caller = former.get(entry.name)
            if caller is None:
                caller = Tenant(entry.name, entry.grant, now_s)
            else:
                caller.change(entry.grant, now_s)
            self._by_name[entry.name] = caller

    def resume(self, name: str, num_charged: int) -> Visit:
        """Lets in what a former process had let in and charged `name` so many tokens for, whatever the limits say now.

        To be used in a `with` statement. A request of somebody who is no caller any more counts for nobody.
        """
        caller = self._anyone or self._by_name.get(name) or Tenant(name, Grant(), 0.0)
        return Visit(caller, num_charged)

    def identify(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Tenant:
        """Whose call this is, by its `authorization: Bearer KEY`. Raises Unauthenticated, which never quotes a key."""
        if self._anyone is not None:
            return self._anyone
        given = [value for name, value in metadata or () if name == AUTHORIZATION]
        if not given:
            raise Unauthenticated("an API key is needed: send the metadata authorization: Bearer KEY", field="api_key")
        scheme, _, key = str(given[0]).partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer":
            raise Unauthenticated("authorization: send one Bearer KEY, and nothing else", field="api_key")
        entry = self._by_id.get(key_id(key.strip()) or "")
        same = hmac.compare_digest(key_sha256(key.strip()), _NO_SHA256 if entry is None else entry.sha256)
        if entry is None or not same:
            raise Unauthenticated("the API key is not known here", field="api_key")
        return self._by_name[entry.name]


def _bucket(former: TokenBucket | None, per_minute: int | None, now_s: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if former is None:
        return TokenBucket(per_minute, now_s)
    former.resize(per_minute, now_s)
    return former

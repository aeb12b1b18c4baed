"""Who calls, what they may do, and how much of it they have used. Pure: the clock's reading comes in."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from stagecoach.errors import PermissionDenied, RateLimited, Unauthenticated
from stagecoach.security.api_keys import Grant, KeyEntry, key_id, key_sha256
from stagecoach_router.tenants.rate_limit import TokenBucket

AUTHORIZATION = "authorization"
# When one of a tenant's requests will end is not known; soon, as a rule.
CONCURRENCY_RETRY_AFTER_S = 1.0
# Calls of the next minute that may be used up in advance by who comes back for a request, at least.
MIN_RETURNS_IN_ADVANCE = 10
# Calls a minute, at least, that are read although the tenant's limits are used up, as any of them may be one that comes
# back for its answer. Reading a request costs far more than refusing the call.
MIN_REFUSALS_READ = 60
# Compared with where there is no such id, so that this takes as long as a wrong key does.
_NO_SHA256 = "0" * 64


class Tenant:
    """One name of the key file; "" is everyone where there is no file."""

    def __init__(self, name: str, grant: Grant, now_s: float) -> None:
        self.name = name
        self.grant = grant
        self.num_running = 0  # sequences: a request with n completions counts n times
        self.requests = _bucket(None, grant.requests_per_minute, now_s)
        self.tokens = _bucket(None, grant.tokens_per_minute, now_s)
        self._refusals = TokenBucket(_refusals_read(grant), now_s)

    def change(self, grant: Grant, now_s: float) -> None:
        """Other limits from now on; what was used stays used."""
        self.requests = _bucket(self.requests, grant.requests_per_minute, now_s)
        self.tokens = _bucket(self.tokens, grant.tokens_per_minute, now_s)
        self._refusals.resize(_refusals_read(grant), now_s)
        self.grant = grant

    def check_model(self, model: str) -> None:
        """Raises PermissionDenied. A name that is not served is refused like any other."""
        if not self.may_use(model):
            raise PermissionDenied(f"model: {self.name} may not use {model!r}", field="model", value=model)

    def may_use(self, model: str) -> bool:
        """Whether this model is among the tenant's."""
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

    @contextmanager
    def admit(self, now_s: float, num_sequences: int = 1) -> Iterator[None]:
        """Lets a request in, which counts as running within the `with` statement, and takes it off the minute's.

        Raises RateLimited, and then takes nothing: its `retry_after_s` is when the request would be let in, if the
        tenant sent nothing else until then. Raises PermissionDenied for more sequences than may ever run.
        """
        self._check_concurrent(num_sequences)
        self._check_wait(*self._longest_wait(now_s), now_s)
        if self.requests is not None:
            self.requests.take(1, now_s)
        self.begin(num_sequences)
        try:
            yield
        finally:
            self.end(num_sequences)

    def admit_return(self, now_s: float) -> None:
        """Lets a call in that comes back for a request which is known, and takes it off the minute's.

        A caller whose connection broke is not to lose its answer because the minute's calls are used up. So some of the
        next minute's may be used in advance, for which new requests wait. Raises RateLimited where those are gone, too.
        """
        limit = self.grant.requests_per_minute
        if self.requests is None or limit is None:
            return
        owing = max(limit, MIN_RETURNS_IN_ADVANCE)
        self._check_wait("requests_per_minute", self.requests.wait_s(now_s, owing), now_s)
        self.requests.take(1, now_s)

    def begin(self, num_sequences: int = 1) -> None:
        """So many sequences run from now on, whatever the limits say, until `end`."""
        self.num_running += num_sequences

    def end(self, num_sequences: int = 1) -> None:
        """So many sequences run no more."""
        self.num_running -= num_sequences

    def _check_concurrent(self, num_sequences: int) -> None:
        limit = self.grant.max_concurrent
        if limit is None or self.num_running + num_sequences <= limit:
            return
        if num_sequences > limit:
            raise PermissionDenied(
                f"n: {num_sequences} completions; {self.name} may have {limit} running",
                field="n",
                limit=limit,
                value=num_sequences,
            )
        raise RateLimited(
            f"{self.num_running} sequences of {self.name} are running; {limit} may",
            field="max_concurrent",
            limit=limit,
            value=self.num_running,
            retry_after_s=CONCURRENCY_RETRY_AFTER_S,
        )

    def check_tokens(self, now_s: float) -> None:
        """Raises RateLimited where no token of the minute's is left: of requests that came in together, not all may
        have been let in if the first had been charged by then.
        """
        if self.tokens is not None:
            self._check_wait("tokens_per_minute", self.tokens.wait_s(now_s), now_s)

    @property
    def is_metered(self) -> bool:
        """Whether its tokens are counted."""
        return self.tokens is not None

    def charge(self, num_tokens: int, now_s: float) -> None:
        """Takes tokens of a request off the minute's, also more than are left: later requests wait for them."""
        if self.tokens is not None:
            self.tokens.take(num_tokens, now_s)

    def check_reading(self, now_s: float) -> None:
        """Raises RateLimited where a call is not to be read: its tenant's minute is used up, and it sends on."""
        wait_s = self._refusals.wait_s(now_s)
        field, longest_s = self._longest_wait(now_s)
        if wait_s > 0 and longest_s > 0:
            raise RateLimited(
                f"{self.name} was refused so often that its calls are not read; again in {wait_s:.1f} s",
                field=field,
                limit=getattr(self.grant, field),
                retry_after_s=wait_s,
            )

    def _longest_wait(self, now_s: float) -> tuple[str, float]:
        waits = {
            "tokens_per_minute": 0.0 if self.tokens is None else self.tokens.wait_s(now_s),
            "requests_per_minute": 0.0 if self.requests is None else self.requests.wait_s(now_s),
        }
        return max(waits.items(), key=lambda item: item[1])

    def _check_wait(self, field: str, wait_s: float, now_s: float) -> None:
        if wait_s > 0:
            self._refusals.take(1, now_s)
            raise RateLimited(
                f"{self.name} has used up its {field.replace('_', ' ')}; again in {wait_s:.1f} s",
                field=field,
                limit=getattr(self.grant, field),
                retry_after_s=wait_s,
            )

    def cache_salt(self, chosen: str) -> bytes:
        """What parts the tenant's blocks in the prefix cache from others', and by `chosen` its own from each other.

        Different (name, chosen) give different salts: the name's length comes first, so that no choice of one tenant
        spells another's name.
        """
        name = "" if self.grant.shares_cache else self.name
        if not name and not chosen:
            return b""
        return len(name.encode()).to_bytes(4, "little") + name.encode() + chosen.encode()


class Tenants:
    """All tenants. Without `entries`, everyone is the same one, who may do anything."""

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
                continue  # another key of the same tenant, with the same limits
            tenant = former.get(entry.name)
            if tenant is None:
                tenant = Tenant(entry.name, entry.grant, now_s)
            else:
                tenant.change(entry.grant, now_s)
            self._by_name[entry.name] = tenant

    def former(self, name: str) -> Tenant:
        """Who is charged for a request of `name` that a former process let in: nobody, if that is no tenant now."""
        return self._anyone or self._by_name.get(name) or Tenant(name, Grant(), 0.0)

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


def _refusals_read(grant: Grant) -> int:
    return max(grant.requests_per_minute or 0, MIN_REFUSALS_READ)


def _bucket(former: TokenBucket | None, per_minute: int | None, now_s: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if former is None:
        return TokenBucket(per_minute, now_s)
    former.resize(per_minute, now_s)
    return former

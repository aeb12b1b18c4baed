"""What a former router left goes on, counts for its tenant, and cannot harm the router that takes it over."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from stagecoach.errors import Cancelled, Overloaded, RateLimited
from stagecoach.sampling_params import SamplingParams
from stagecoach.security.api_keys import Grant, new_entry, new_key
from stagecoach.v1.model_pb2 import ModelDescription
from stagecoach_router.durability.journal import Journal
from stagecoach_router.durability.journal_store import Begin, JournaledRequest, JournalStore
from stagecoach_router.durability.recovery import recover_requests
from stagecoach_router.durability.request_registry import RequestRegistry
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.tenants.tenants import Tenants

MODEL = ModelDescription(fingerprint="f00d", vocab_size=20, context_length=32)
LINGER_S = 60.0


def left(
    name: str, request_id: str, prompt: tuple[int, ...] = (1, 2, 3), num_past: int = 2, seed: int | None = 1
) -> JournaledRequest:
    request = Request(request_id, prompt, SamplingParams(max_tokens=9, seed=seed))
    return JournaledRequest((name, request_id), b"digest", request, [[Sampled(7, None, ())] * num_past])


class FakeJournal:
    """Holds `entries`, and remembers what it is to forget."""

    def __init__(self, *entries: JournaledRequest) -> None:
        self._entries = list(entries)
        self.forgotten: list[str] = []

    async def load(self, fingerprint: str) -> list[JournaledRequest]:
        assert fingerprint == "f00d"
        return self._entries

    def forget(self, key: tuple[str, str]) -> None:
        self.forgotten.append(key[1])

    async def close(self) -> None:
        pass


class FakeEngine:
    """Takes requests, but none that is called full, or strange, and computes nothing."""

    def __init__(self) -> None:
        self.num_submitted = 0
        self.deadlines_s: list[float] = []

    def submit(self, state: RequestState, past: Any = ()) -> None:
        if state.request.request_id == "full":
            raise Overloaded("no room")
        if state.request.request_id == "strange":
            raise ZeroDivisionError("a bug")
        assert not self.deadlines_s, "callers could not come back yet"
        self.num_submitted += 1

    def cancel(self, state: RequestState) -> None:
        pass

    def set_deadline(self, state: RequestState, deadline_s: float | None) -> None:
        assert deadline_s is not None
        self.deadlines_s.append(deadline_s)


def accepted_requests() -> RequestRegistry:
    engine: Any = FakeEngine()
    return RequestRegistry(engine, max_linger_s=LINGER_S)


def known_tenants(**limits: Any) -> Tenants:
    return Tenants((new_entry(new_key(), "ann", Grant(**limits)),), 0.0)


async def test_a_request_counts_for_its_tenant_until_it_ends() -> None:
    known, requests = known_tenants(max_concurrent=1), accepted_requests()
    journal: Any = FakeJournal(left("ann", "r"))
    await recover_requests(journal, requests, known, MODEL, LINGER_S)
    ann = known._by_name["ann"]
    with pytest.raises(RateLimited), ann.admit(0.0):
        pass
    accepted = requests.find(("ann", "r"), b"digest")
    assert accepted is not None
    accepted.fail(Cancelled("gone"))
    assert ann.num_running == 0
    assert requests.num_running == 0


async def test_a_request_that_cannot_go_on_is_forgotten_and_counts_for_nobody(caplog: pytest.LogCaptureFixture) -> None:
    known, requests = known_tenants(), accepted_requests()
    bad = [
        left("ann", "full"),
        left("ann", "strange"),
        left("ann", "words", (1, 99)),
        left("ann", "long", (1,) * 40),
        left("ann", "past", num_past=10),
        left("ann", "seedless", seed=None),
    ]
    journal: Any = FakeJournal(*bad, left("ann", "good"))
    with caplog.at_level(logging.INFO):
        await recover_requests(journal, requests, known, MODEL, LINGER_S)
    assert journal.forgotten == ["full", "strange", "words", "long", "past", "seedless"]
    assert known._by_name["ann"].num_running == requests.num_running == 1
    assert "7 requests of the journal, 1 of them go on" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert caplog.text.count("Traceback") == 1
    requests.close()


async def test_the_time_to_come_back_begins_when_all_requests_go_on() -> None:
    """With thousands of them it may take longer to go through them than they linger."""
    engine: Any = FakeEngine()
    requests = RequestRegistry(engine, max_linger_s=LINGER_S)
    journal: Any = FakeJournal(*(left("ann", f"r{number}") for number in range(3)))
    await recover_requests(journal, requests, known_tenants(), MODEL, LINGER_S)
    assert (engine.num_submitted, len(engine.deadlines_s)) == (3, 3)
    requests.close()


async def test_a_caller_that_is_gone_gets_its_request_done_all_the_same() -> None:
    known, requests = known_tenants(), accepted_requests()
    journal: Any = FakeJournal(left("bob", "r"))
    await recover_requests(journal, requests, known, MODEL, LINGER_S)
    assert requests.num_running == 1
    assert known._by_name["ann"].num_running == 0
    requests.close()


async def test_a_stop_in_the_midst_of_it_leaves_every_request_in_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with closing(JournalStore(path)) as store:
        store.check_model("f00d")
        entries = [left("ann", f"r{number}", num_past=0) for number in range(5)]
        store.apply([Begin(entry.key, entry.digest, entry.request) for entry in entries])
    journal = Journal(path)
    await journal.open()
    engine: Any = FakeEngine()
    requests = RequestRegistry(engine, max_linger_s=LINGER_S, log=journal)
    recovering = asyncio.create_task(recover_requests(journal, requests, known_tenants(), MODEL, LINGER_S))
    async with asyncio.timeout(10):
        while requests.num_running < 3:
            await asyncio.sleep(0)
    recovering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await recovering
    requests.close()  # as the router does when it stops: they fail
    await journal.close()
    with closing(JournalStore(path)) as store:
        assert [entry.key[1] for entry in store.load()] == ["r0", "r1", "r2", "r3", "r4"]

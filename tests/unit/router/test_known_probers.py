"""Who probes the router's health goes on to be answered, however many strangers ask as well."""

from __future__ import annotations

import asyncio
import gc

from stagecoach_router.frontend.known_probers import PLACES_EACH, KnownProbers

KEEP_S = 10.0


async def check(probers: KnownProbers, host: str, until: asyncio.Event) -> None:
    probers.calls.enter(host, 1.0)
    await until.wait()


async def test_each_known_host_has_its_places_and_a_stranger_none() -> None:
    probers, done = KnownProbers(3, KEEP_S), asyncio.Event()
    hosts = ("a", "b", "c")
    assert not probers.has_place_for("a"), "it has not been answered yet"
    for host in hosts:
        probers.answered(host, 0.0)
    probers.answered("stranger", KEEP_S)
    assert not probers.has_place_for("stranger")
    calls = []
    for host in hosts:
        for _ in range(PLACES_EACH):
            assert probers.has_place_for(host)
            calls.append(asyncio.create_task(check(probers, host, done)))
            await asyncio.sleep(0)
        assert not probers.has_place_for(host), "the next one has to go where strangers go"
    done.set()
    await asyncio.wait(calls)
    del calls
    gc.collect()
    await asyncio.sleep(0)  # the loop gives the places back
    assert all(probers.has_place_for(host) for host in hosts)


async def test_who_has_not_come_for_long_makes_room_unless_its_call_is_open() -> None:
    probers, done = KnownProbers(2, KEEP_S), asyncio.Event()
    probers.answered("a", 0.0)
    probers.answered("b", 0.0)
    call = asyncio.create_task(check(probers, "a", done))
    await asyncio.sleep(0)
    probers.answered("c", KEEP_S + 1)
    assert probers.has_place_for("c")
    assert not probers.has_place_for("b")
    probers.answered("d", KEEP_S + 1)
    assert not probers.has_place_for("d"), "two are known, one of which keeps its place"
    done.set()
    await call

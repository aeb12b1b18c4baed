"""Refusals are told to the operator: once a host, within bounds."""

from __future__ import annotations

import pytest

from stagecoach.errors import PermissionDenied, Unauthenticated
from stagecoach.security import refusals
from stagecoach.security.refusals import MAX_HOSTS, MAX_LINES_A_MINUTE, REPEAT_AFTER_S, RefusalLog

WRONG_NAME = PermissionDenied("the caller's certificate is for intruder")


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> RefusalLog:
    return RefusalLog(clock)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_host_is_told_of_once_with_address_and_reason(log: RefusalLog, caplog: pytest.LogCaptureFixture) -> None:
    for port in range(100):
        log.refused(f"ipv4:10.0.0.7:{port}", WRONG_NAME)
    assert lines(caplog) == ["refused ipv4:10.0.0.7:0: the caller's certificate is for intruder"]


def test_another_host_and_another_kind_of_refusal_are_told_of(
    log: RefusalLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.refused("ipv4:10.0.0.7:1", WRONG_NAME)
    log.refused("ipv4:10.0.0.8:1", WRONG_NAME)
    log.refused("ipv4:10.0.0.7:1", Unauthenticated("no key"))
    assert len(lines(caplog)) == 3


def test_it_is_said_again_after_an_hour_with_how_many_there_were(
    log: RefusalLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        log.refused("ipv4:10.0.0.7:1", WRONG_NAME)
    clock.now_s += REPEAT_AFTER_S
    for _ in range(5):
        log.refused("ipv4:10.0.0.7:1", WRONG_NAME)
    assert len(lines(caplog)) == 2
    assert lines(caplog)[1].endswith("(4 more since the last time that this was said)")


def test_strangers_take_no_more_memory_than_so_much(
    log: RefusalLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refusals, "MAX_HOSTS", 4)
    monkeypatch.setattr(refusals, "MAX_LINES_A_MINUTE", 101)
    for number in range(100):
        log.refused("ipv4:10.0.0.7:1", WRONG_NAME)  # whoever comes again and again is kept
        log.refused(f"ipv4:10.0.1.{number}:1", WRONG_NAME)
    assert len(log._told) == 4
    assert len(lines(caplog)) == 101


def test_all_addresses_of_an_ipv6_network_are_one_host(log: RefusalLog, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, 100):
        log.refused(f"ipv6:%5B2001:db8::{number:x}%5D:1", WRONG_NAME)
    assert len(lines(caplog)) == 1


def test_whoever_has_many_addresses_gets_so_many_lines_a_minute(
    log: RefusalLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for host in range(MAX_HOSTS + 1):
        log.refused(f"ipv6:%5B2001:db8:{host:x}::1%5D:1", WRONG_NAME)
    assert len(lines(caplog)) == MAX_LINES_A_MINUTE
    clock.now_s += 60.0
    log.refused("ipv4:10.0.0.7:1", WRONG_NAME)
    num_untold = MAX_HOSTS + 1 - MAX_LINES_A_MINUTE
    assert lines(caplog)[-2] == f"{num_untold} more refusals, of more hosts than are told of in a minute"
    assert lines(caplog)[-1].startswith("refused ipv4:10.0.0.7:1")

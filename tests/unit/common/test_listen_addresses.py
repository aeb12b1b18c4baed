"""A listener has every address of its host, or says which it cannot have, and why."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from stagecoach.errors import ConfigError
from stagecoach.process.listen_addresses import listen_addresses
from stagecoach.process.listener import listen
from stagecoach.rpc.addresses import split_address

TWO = ["127.0.0.1", "127.0.0.2"]


@contextmanager
def another_process(host: str) -> Iterator[int]:
    """Someone who listens on a port of `host`, and on no other address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as taken:
        if family == socket.AF_INET6:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            taken.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.parametrize("taken", TWO)
def test_a_name_of_which_one_address_is_taken_is_refused(taken: str) -> None:
    with another_process(taken) as port, pytest.raises(ConfigError, match=f"{taken}: Address already in use") as caught:
        listen_addresses(f"two:{port}", lambda host: TWO)
    assert caught.value.field == "listen"
    assert f"two:{port}" in caught.value.message


@pytest.mark.parametrize("taken", ["127.0.0.1", "::1"])
async def test_localhost_is_both_families_as_it_is_for_callers(taken: str) -> None:
    with another_process(taken) as port, pytest.raises(ConfigError, match="Address already in use"):
        listen(1024, f"localhost:{port}")


@pytest.mark.parametrize("taken", ["0.0.0.0", "::", "127.0.0.1"])
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_all_interfaces_are_those_of_both_families(taken: str, host: str) -> None:
    with another_process(taken) as port, pytest.raises(ConfigError, match="Address already in use"):
        listen_addresses(f"{host}:{port}")


def test_any_port_is_the_same_one_on_all_addresses() -> None:
    first, second = listen_addresses("two:0", lambda host: TWO)
    assert [split_address(each, "listen")[0] for each in (first, second)] == TWO
    assert split_address(first, "listen")[1] == split_address(second, "listen")[1] > 0


async def test_a_server_is_reached_at_every_address_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stagecoach.process.listener.listen_addresses", lambda address: listen_addresses(address, lambda host: TWO)
    )
    server, port = listen(1024, "two:0", insecure=True)
    await server.start()
    for ip in TWO:
        socket.create_connection((ip, port), timeout=10).close()
    await server.stop(None)


def test_an_address_that_this_machine_does_not_have_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As ::1 is, which a name stands for also where IPv6 is turned off."""
    assert listen_addresses("both:0", lambda host: ["127.0.0.1", "192.0.2.1"])[0].startswith("127.0.0.1:")
    assert "192.0.2.1: Cannot assign requested address" in caplog.text


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("192.0.2.1:5000", "192.0.2.1: Cannot assign"),
        ("[2001:db8::1]:0", r"\[2001:db8::1\]: (Cannot assign|Address family)"),
        ("no.such.name.invalid:5000", "no.such.name.invalid has no address here"),
        ("a" * 64 + ".invalid:5000", "has no address here"),
    ],
)
async def test_an_address_that_cannot_be_had_is_an_error_with_the_reason(address: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        listen(1024, address, insecure=True)
    assert caught.value.field == "listen"
    assert address in caught.value.message


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0"])
def test_an_ip_and_any_port_are_left_to_grpc(address: str) -> None:
    assert listen_addresses(address) == [address]


def test_an_ipv4_address_that_is_written_as_ipv6_is_one() -> None:
    assert listen_addresses("[::ffff:127.0.0.1]:0") == ["127.0.0.1:0"]


async def test_a_name_that_leads_elsewhere_is_not_taken_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagecoach.process.listener.listen_addresses", lambda address: ["0.0.0.0:0"])
    with pytest.raises(ConfigError, match="--insecure-listen"):
        listen(1024, "localhost:0")

"""Whose certificates are used and accepted, where a process may listen without, and what happens when files change."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from stagecoach.errors import ConfigError, PermissionDenied
from stagecoach.process.listener import listen
from stagecoach.process.settings import read_settings
from stagecoach.rpc.addresses import is_loopback
from stagecoach.rpc.channel import dial_plainly
from stagecoach.security.tls import (
    ROUTER_NAME,
    SHARD_NAME,
    Identity,
    check_caller,
    read_identity,
    read_names,
    shard_dial,
)
from stagecoach.topology import LayerRange
from stagecoach_cli.options import choose_tls
from stagecoach_client import Tls
from stagecoach_local import LocalCluster
from stagecoach_local.certificates import (
    ClusterCertificates,
    Issued,
    ThrowawayCA,
    issue_cluster,
    throwaway_certificates,
)
from stagecoach_router.settings import RouterSettings


@pytest.fixture
def issued(tmp_path: Path) -> ClusterCertificates:
    return issue_cluster(tmp_path / "first")


def replace(old: ClusterCertificates, new: ClusterCertificates) -> None:
    """Puts the shard's new files in the place of its old ones."""
    for name in ("cert", "key"):
        getattr(old.shard, name).write_bytes(getattr(new.shard, name).read_bytes())
    old.ca.write_bytes(new.ca.read_bytes())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "[::1]", "[0:0::1]", "[::ffff:127.0.0.1]", "localhost"])
def test_loopback_is_what_only_this_machine_reaches(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "[::]", "10.0.0.1", "128.0.0.1", "[::2]", "[::ffff:10.0.0.1]", "localhost.evil.org", "gpu-1"]
)
def test_without_tls_other_addresses_are_refused_with_the_way_out(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"--tls-cert.*--insecure-listen") as caught:
        listen(1, f"{host}:50051")
    assert caught.value.field == "listen"


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_an_identity_has_all_three_files_or_is_none(issued: ClusterCertificates, missing: str) -> None:
    files: dict[str, Path | None] = {"cert": issued.shard.cert, "key": issued.shard.key, "ca": issued.ca}
    assert read_identity(**files) is not None
    assert read_identity(None, None, None) is None
    with pytest.raises(ConfigError, match="all of tls-cert, tls-key and tls-ca, or none") as caught:
        read_identity(**{**files, missing: None})
    assert caught.value.field == f"tls_{missing}"


def test_without_an_identity_shards_are_dialled_plainly() -> None:
    assert shard_dial(None, SHARD_NAME) is dial_plainly


@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
@pytest.mark.parametrize("which", ["cert", "key", "ca"])
def test_files_that_are_no_pem_are_named(issued: ClusterCertificates, which: str, content: bytes) -> None:
    files = {"cert": issued.shard.cert, "key": issued.shard.key, "ca": issued.ca}
    files[which].write_bytes(content)
    with pytest.raises(ConfigError, match="PEM certificate") as caught:
        Identity(**files)
    assert str(files[which]) in caught.value.message


def test_a_key_of_another_certificate_is_refused(issued: ClusterCertificates) -> None:
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        Identity(issued.shard.cert, issued.router.key, issued.ca)


def test_a_missing_file_is_named(issued: ClusterCertificates) -> None:
    issued.shard.key.unlink()
    with pytest.raises(ConfigError, match="No such file") as caught:
        Identity(*issued.shard, issued.ca)
    assert caught.value.field == "tls_key"


def test_a_key_is_in_no_repr(issued: ClusterCertificates) -> None:
    pem = Identity(*issued.shard, issued.ca).current
    assert b"PRIVATE KEY" in pem.key
    assert "PRIVATE KEY" not in repr(pem)


async def test_changed_files_are_used_from_then_on(issued: ClusterCertificates, tmp_path: Path) -> None:
    identity = Identity(*issued.shard, issued.ca)
    before = identity.current
    await identity.check()
    assert identity.current is before
    new = issue_cluster(tmp_path / "second")
    replace(issued, new)
    await identity.check()
    assert identity.current.cert == new.shard.cert.read_bytes() != before.cert
    assert identity.current.key == new.shard.key.read_bytes()
    assert identity.current.ca == new.ca.read_bytes()


async def test_a_broken_new_file_is_reported_once_and_the_old_one_stays(
    issued: ClusterCertificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity = Identity(*issued.shard, issued.ca)
    before = identity.current
    issued.shard.cert.write_bytes(issue_cluster(tmp_path / "second").shard.cert.read_bytes())  # not its key
    with caplog.at_level(logging.ERROR):
        await identity.check()
        await identity.check()
    assert identity.current is before
    (record,) = caplog.records
    assert "what was there before stays in use" in record.getMessage()
    issued.shard.cert.write_bytes(before.cert)
    await identity.check()
    assert identity.current == before


class Tenant:
    """A call's context, as far as it says who calls."""

    def __init__(self, *names: str) -> None:
        self._names = [name.encode() for name in names]

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"peer_dns": self._names, "x509_common_name": [SHARD_NAME.encode()]} if self._names else {}


ALLOWED = read_names(f"{ROUTER_NAME}, {SHARD_NAME.upper()}", "allow_peer")


@pytest.mark.parametrize("names", [[ROUTER_NAME], ["other", "Stagecoach-Shard"]])
def test_a_caller_with_an_allowed_name_comes_in(names: list[str]) -> None:
    check_caller(context(*names), ALLOWED)


@pytest.mark.parametrize("names", [[], ["intruder"], ["*.stagecoach-router"], ["stagecoach-router.evil.org"], ["*"]])
def test_a_caller_without_is_refused_with_its_name(names: list[str]) -> None:
    with pytest.raises(PermissionDenied, match=r"allowed here .*stagecoach-router, stagecoach-shard") as caught:
        check_caller(context(*names), ALLOWED)
    assert all(name in caught.value.message for name in names)


def context(*names: str) -> Any:
    return Tenant(*names)


@pytest.mark.parametrize("text", ["", " , "])
def test_nobody_is_not_a_list_of_names(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_names(text, "allow_peer")
    assert caught.value.field == "allow_peer"


def test_a_throwaway_authority_issues_what_each_side_checks(issued: ClusterCertificates) -> None:
    certificate = x509.load_pem_x509_certificate(issued.router.cert.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {ROUTER_NAME, "localhost"} <= set(names.get_values_for_type(x509.DNSName))
    assert {"127.0.0.1", "::1"} <= {str(ip) for ip in names.get_values_for_type(x509.IPAddress)}
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(issued.ca.read_bytes()))
    shard = x509.load_pem_x509_certificate(issued.shard.cert.read_bytes())
    names = shard.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names.get_values_for_type(x509.DNSName)) == [SHARD_NAME]


def test_keys_are_for_their_owner_only_and_the_authoritys_is_nowhere(issued: ClusterCertificates) -> None:
    folder = issued.ca.parent
    for file in folder.iterdir():
        assert file.suffix == ".pem" or stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(file.name for file in folder.glob("*.key")) == [f"{ROUTER_NAME}.key", f"{SHARD_NAME}.key"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_run_leaves_no_certificates_behind() -> None:
    with throwaway_certificates(router_hosts=["10.1.2.3"]) as issued:
        certificate = x509.load_pem_x509_certificate(issued.router.cert.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert "10.1.2.3" in {str(ip) for ip in names.get_values_for_type(x509.IPAddress)}
    assert not issued.ca.parent.exists()


def test_a_lifetime_counts_from_now(tmp_path: Path) -> None:
    over: Issued = ThrowawayCA(tmp_path).issue("late", lifetime=timedelta(minutes=-1))
    certificate = x509.load_pem_x509_certificate(over.cert.read_bytes())
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(minutes=59)


def test_a_client_that_is_told_nothing_of_tls_uses_none(issued: ClusterCertificates) -> None:
    assert choose_tls(None, None, None, "") is None
    assert choose_tls(issued.ca, None, None, "") == Tls(issued.ca)
    assert choose_tls(None, None, None, "router.example") == Tls(server_name="router.example")


def test_a_clients_mistakes_are_typed(issued: ClusterCertificates) -> None:
    with pytest.raises(ConfigError) as caught:
        Tls(issued.ca, cert=issued.router.cert)
    assert caught.value.field == "tls_key"
    with pytest.raises(ConfigError, match="cannot read"):
        Tls(issued.ca.parent / "absent.pem").credentials()
    with pytest.raises(ConfigError, match="no PEM certificate"):
        Tls(issued.router.key).credentials()
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        Tls(issued.ca, issued.router.cert, issued.shard.key).credentials()


def commands_of(cluster: LocalCluster) -> tuple[list[str], list[str]]:
    commands = cluster._commands
    return list(commands.shard(0, LayerRange(0, 2), "127.0.0.1:1")), list(commands.router(["127.0.0.1:1"], "x:2"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    return tmp_path


@pytest.mark.parametrize(("listen", "edge_tls"), [("127.0.0.1:0", False), ("0.0.0.0:0", True), ("10.0.0.1:5", True)])
def test_a_local_cluster_encrypts_links_and_the_edge_where_others_can_reach_it(
    issued: ClusterCertificates, model: Path, listen: str, edge_tls: bool
) -> None:
    cluster = LocalCluster(model, 1, listen=listen, certificates=issued)
    shard, router = commands_of(cluster)
    for command, own in ((shard, issued.shard), (router, issued.router)):
        flags = ["--tls-cert", str(own.cert), "--tls-key", str(own.key), "--tls-ca", str(issued.ca)]
        assert " ".join(flags) in " ".join(command)
    assert ("--no-edge-tls" not in router) == edge_tls
    assert cluster.tls == (Tls(issued.ca) if edge_tls else None)
    assert "--insecure-listen" not in router


def test_a_local_cluster_without_certificates_has_no_tls_and_is_insecure_only_in_so_many_words(model: Path) -> None:
    for insecure_listen in (False, True):
        cluster = LocalCluster(model, 1, listen="0.0.0.0:0", insecure_listen=insecure_listen)
        shard, router = commands_of(cluster)
        assert not [argument for argument in shard + router if "tls" in argument]
        assert ("--insecure-listen" in router) == insecure_listen
        assert "--insecure-listen" not in shard
        assert cluster.tls is None


def test_the_flags_are_read_as_they_are_written(issued: ClusterCertificates) -> None:
    flags = ["--tls-cert", str(issued.router.cert), "--no-edge-tls", "--insecure-listen"]
    settings = read_settings(RouterSettings, "prog", ["--shards", "a:1", *flags], "PROG_TEST_")
    assert (settings.tls_cert, settings.edge_tls, settings.insecure_listen) == (issued.router.cert, False, True)
    settings = read_settings(RouterSettings, "prog", ["--shards", "a:1"], "PROG_TEST_")
    assert (settings.tls_cert, settings.edge_tls, settings.insecure_listen) == (None, True, False)
    assert settings.tls_shard_name == SHARD_NAME


def test_a_file_that_is_too_large_for_pem_is_not_read(issued: ClusterCertificates) -> None:
    with issued.ca.open("ab") as file:
        file.truncate(2 << 20)
    with pytest.raises(ConfigError, match="more than 1048576 bytes") as caught:
        read_identity(issued.shard.cert, issued.shard.key, issued.ca)
    assert caught.value.field == "tls_ca"


def test_a_certificate_that_is_not_valid_now_is_refused_with_its_dates(issued: ClusterCertificates) -> None:
    for away in (timedelta(days=366), timedelta(days=-2)):
        with pytest.raises(ConfigError, match=r"shard\.pem is valid from 20.* to 20.*; it is 20") as caught:
            Identity(*issued.shard, issued.ca, now=lambda away=away: datetime.now(UTC) + away)  # type: ignore[misc]
        assert caught.value.field == "tls_cert"


async def test_a_new_certificate_that_has_ended_is_reported_and_the_old_one_stays(
    issued: ClusterCertificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity = Identity(*issued.shard, issued.ca)
    before = identity.current
    ended = issue_cluster(tmp_path / "second", lifetime=timedelta(minutes=-1))
    replace(issued, ended)
    await identity.check()
    assert identity.current is before
    assert "is valid from" in caplog.text
    assert "what was there before stays in use" in caplog.text


async def test_a_certificate_that_came_too_early_is_used_from_its_first_day_on(
    issued: ClusterCertificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    identity = Identity(*issued.shard, issued.ca, now=lambda: now)
    before = identity.current
    now -= timedelta(hours=2)  # this process's clock is behind the authority's
    new = issue_cluster(tmp_path / "second")
    replace(issued, new)
    for _ in range(2):
        await identity.check()
        assert identity.current is before
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    now += timedelta(hours=2)
    await identity.check()
    assert identity.current.cert == new.shard.cert.read_bytes() != before.cert


async def test_a_certificate_that_came_too_early_is_used_also_where_the_disk_hangs_on_its_first_day(
    issued: ClusterCertificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    identity = Identity(*issued.shard, issued.ca, now=lambda: now)
    now -= timedelta(hours=2)
    new = issue_cluster(tmp_path / "second")
    replace(issued, new)
    await identity.check()
    now += timedelta(hours=2)
    comes_back, read = threading.Event(), identity._files._read
    monkeypatch.setattr(identity._files, "_timeout_s", 0.01)
    monkeypatch.setattr(identity._files, "_read", lambda: comes_back.wait() and read())
    for _ in range(3):
        await identity.check()
        assert identity.current.cert != new.shard.cert.read_bytes()
    comes_back.set()
    monkeypatch.setattr(identity._files, "_timeout_s", 10.0)
    async with asyncio.timeout(10):
        while identity.current.cert != new.shard.cert.read_bytes():
            await asyncio.sleep(0.001)
            await identity.check()


async def test_a_certificate_that_ends_soon_is_warned_of_once_a_day(
    issued: ClusterCertificates, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    identity = Identity(*issued.shard, issued.ca, now=lambda: now)
    await identity.check()
    assert caplog.text == ""
    now += timedelta(days=340)
    for _ in range(3):
        await identity.check()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ends at 20" in caplog.text
    now += timedelta(days=30)  # it has ended, and what was opened with it goes on
    await identity.check()
    assert len(caplog.records) == 2
    assert "has ended at 20" in caplog.text


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir], ids=["a pipe that nobody writes to", "a folder"])
async def test_what_is_no_regular_file_stops_nobody(
    issued: ClusterCertificates, caplog: pytest.LogCaptureFixture, put: Callable[[Path], None]
) -> None:
    identity = Identity(*issued.shard, issued.ca)
    before = identity.current
    issued.shard.cert.unlink()
    put(issued.shard.cert)
    await identity.check()
    assert identity.current is before
    assert str(issued.shard.cert) in caplog.text
    with pytest.raises(ConfigError, match=r"regular file|directory"):
        Identity(*issued.shard, issued.ca)

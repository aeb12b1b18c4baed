"""Who a process is to its peers, and whom it trusts: its certificate and key, and the CA of its peers' certificates.

The files are looked at every second, and read again when they have changed. A new set that cannot be used is reported
once, and the old one stays in use. Connections keep what they began with. Who connects waits for no file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from stagecoach.errors import ConfigError, PermissionDenied
from stagecoach.rpc.channel import Dial, dial_plainly, shard_channel_options
from stagecoach.security.pem_files import check_ca, check_key_pair, read_dates, read_file
from stagecoach.security.watched_files import WatchedFiles, check_for_ever, read_at_start, signature

logger = logging.getLogger(__name__)

# The names in our certificates. They are roles and no host names: a router is given the addresses of shards, which are
# often IPs and change, and whoever holds a shard's key is trusted as a shard, wherever it runs.
ROUTER_NAME = "stagecoach-router"
SHARD_NAME = "stagecoach-shard"

WARN_BEFORE_END = timedelta(days=30)


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files hold. `ca` is None where peers need no certificate, `not_after` is when the certificate ends."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes | None
    not_after: datetime


class _NotValidNow(ConfigError):
    """A certificate that is valid from `begins` to `ends`, and not at `now`."""

    def __init__(self, cert: Path, begins: datetime, ends: datetime, now: datetime) -> None:
        dates = f"{begins.isoformat()} to {ends.isoformat()}"
        text = f"tls_cert: {cert} is valid from {dates}; it is {now.isoformat()}"
        super().__init__(text, field="tls_cert", limit=dates, value=now.isoformat(timespec="seconds"))
        self.begins = begins if now < begins else None  # None: it has ended


class Identity:
    """A certificate with its key, and the CA of the peers' certificates. With None for `ca`, peers need none.

    A certificate that ends within 30 days is warned of once a day. `now` is the clock that its dates are compared with.
    Raises ConfigError for files that cannot be read, are no PEM, do not belong together, or hold a certificate that is
    not valid now: every peer would refuse it, and say so in its own log only.
    """

    def __init__(self, cert: Path, key: Path, ca: Path | None, *, now: Callable[[], datetime] = _utc_now) -> None:
        self._cert, self._key, self._ca = cert, key, ca
        self._now = now
        self._warned_on: date | None = None
        self._begins: datetime | None = None  # of a certificate that was refused as it is not valid yet
        paths = [path for path in (cert, key, ca) if path is not None]
        self._files = WatchedFiles(paths, self._read, "tls_cert")

    @property
    def current(self) -> Pem:
        """What the files hold, or held when they could last be used. For any thread: gRPC asks from its own."""
        return self._files.content

    async def watch(self) -> NoReturn:
        """Looks at the files every second, until cancelled."""
        await check_for_ever(self.check)

    async def check(self) -> None:
        """Takes over what has changed."""
        has_begun = self._begins is not None and self._begins <= self._now()
        try:
            if await self._files.look(again=has_begun):
                self._begins = None
                logger.info("tls: %s and what goes with it have changed, and are used from now on", self._cert)
        except ConfigError as error:
            if not self._files.is_hanging:  # else nobody has looked: it is tried until somebody has
                self._begins = error.begins if isinstance(error, _NotValidNow) else None
            logger.error("%s; what was there before stays in use", error)
        self._warn_of_end(self.current)

    def server_credentials(self) -> grpc.ServerCredentials:
        """The credentials of a listener. Where there is a CA, callers must show a certificate of it."""
        given = self.current

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """gRPC calls it before each handshake. None tells that nothing has changed."""
            nonlocal given
            pem = self.current
            if pem is given:
                return None
            given = pem
            return _server_configuration(pem)

        return grpc.dynamic_ssl_server_credentials(
            _server_configuration(given),
            fetch,  # type: ignore[arg-type]  # gRPC takes None, its stubs do not
            require_client_authentication=self._ca is not None,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """The credentials of a channel to a peer, whose certificate must be of the CA. It gets ours if it asks."""
        pem = self.current
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)

    def _warn_of_end(self, pem: Pem) -> None:
        now = self._now()
        if pem.not_after - now < WARN_BEFORE_END and self._warned_on != now.date():
            self._warned_on = now.date()
            ends = "has ended" if pem.not_after <= now else "ends"
            logger.warning("tls: the certificate %s %s at %s", self._cert, ends, pem.not_after.isoformat())

    def _read(self) -> Pem:
        paths = [path for path in (self._cert, self._key, self._ca) if path is not None]
        before = [signature(path) for path in paths]
        cert, key = read_file(self._cert, "tls_cert"), read_file(self._key, "tls_key")
        ca = None if self._ca is None else read_file(self._ca, "tls_ca")
        check_key_pair(self._cert, self._key)
        pem = Pem(cert, key, ca, self._check_dates(cert))
        if pem.ca is not None:
            check_ca(pem.ca, str(self._ca))
        if [signature(path) for path in paths] != before:  # what was checked may not be what was read
            raise ConfigError(f"tls_cert: {self._cert} changed while it was read", field="tls_cert", value=self._cert)
        return pem

    def _check_dates(self, cert: bytes) -> datetime:
        """When the certificate ends. Raises ConfigError, with its dates, where it is not valid now."""
        (begins, ends), now = read_dates(cert, self._cert), self._now()
        if begins <= now < ends:
            return ends
        raise _NotValidNow(self._cert, begins, ends, now)


def read_identity(cert: Path | None, key: Path | None, ca: Path | None) -> Identity | None:
    """The identity of a process whose settings name all three files, or None where they name none.

    Raises ConfigError where they name only some, and what `Identity` raises.
    """
    files = {"tls_cert": cert, "tls_key": key, "tls_ca": ca}
    missing = [name for name, path in files.items() if path is None]
    if cert is None or key is None or ca is None:
        if len(missing) == len(files):
            return None
        raise ConfigError(f"{missing[0]}: give all of tls-cert, tls-key and tls-ca, or none", field=missing[0])
    return Identity(cert, key, ca)


async def load_identity(cert: Path | None, key: Path | None, ca: Path | None) -> Identity | None:
    """As `read_identity`, beside the event loop. Raises ConfigError, too, where the files cannot be read in time."""
    return await read_at_start(lambda: read_identity(cert, key, ca), "tls_cert", cert, key, ca)


def shard_dial(identity: Identity | None, name: str) -> Dial:
    """How to connect to shards: without TLS where there is no identity, else with it.

    A shard's certificate must be for `name`, or for the host of its address where that is "".
    """
    if identity is None:
        return dial_plainly

    def dial(address: str) -> grpc.aio.Channel:
        options = [*shard_channel_options(), *name_override(name)]
        return grpc.aio.secure_channel(address, identity.channel_credentials(), options=options)

    return dial


def read_names(text: str, field_name: str) -> frozenset[str]:
    """The names in "one,two". Raises ConfigError where there is none."""
    names = frozenset(part.strip().lower() for part in text.split(",")) - {""}
    if not names:
        raise ConfigError(f"{field_name}: no name in {text!r}", field=field_name, value=text)
    return names


def check_caller(
    context: grpc.aio.ServicerContext[Any, Any], allowed: Collection[str], field_name: str = "allow_peer"
) -> None:
    """Raises PermissionDenied unless one of the `allowed` names (of `read_names`) is on the caller's certificate.

    Its subject alternative names of the type DNS are compared as they are: a wildcard matches nothing. That the
    certificate is valid and of our CA is what the handshake has checked.
    """
    names = sorted({value.decode(errors="backslashreplace") for value in context.auth_context().get("peer_dns", ())})
    if not {name.lower() for name in names}.intersection(allowed):
        raise PermissionDenied(
            f"the caller's certificate is for {', '.join(names) or 'no DNS name'}; "
            f"allowed here ({field_name.replace('_', '-')}): {', '.join(sorted(allowed))}",
            field=field_name,
            limit=", ".join(sorted(allowed)),
            value=", ".join(names),
        )


def name_override(name: str) -> list[tuple[str, Any]]:
    """The channel option by which the peer's certificate must be for `name`, whatever the address. None for ""."""
    return [("grpc.ssl_target_name_override", name)] if name else []


def _server_configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)

"""Who a process is to its peers: its certificate and key, and the CA whose certificates it takes from them.

The files are read again when they change, at the next connection. A new set that cannot be used is reported once, and
the old one stays. Connections that exist go on with what they began with.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from stagecoach.errors import ConfigError, PermissionDenied
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES, Dial, channel_options, dial_plainly
from stagecoach.security.watched_files import Signature, read_bounded, signature

logger = logging.getLogger(__name__)

# What our certificates call their holders. A role and no host name: shards are reached by addresses that a router was
# given, which are often IPs, and change; and whoever holds a shard's key is trusted as a shard, wherever it runs.
ROUTER_NAME = "stagecoach-router"
SHARD_NAME = "stagecoach-shard"

# Of one PEM file: a CA's bundle of the whole web has a quarter of it.
MAX_FILE_BYTES = 1 << 20
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


class Identity:
    """A certificate with its key, and the CA of the peers; None takes peers without a certificate.

    A certificate that ends within 30 days is warned of once a day, while it is being used. `now` is the clock that its
    dates are compared with. Raises ConfigError for files that cannot be read, are no PEM, do not belong together, or
    hold a certificate that is not valid now: every peer would refuse it, and each would say so in its own log only.
    """

    def __init__(self, cert: Path, key: Path, ca: Path | None, *, now: Callable[[], datetime] = _utc_now) -> None:
        self._cert, self._key, self._ca = cert, key, ca
        self._now = now
        self._warned_on: date | None = None
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self._seen = self._signatures()
        self._pem = self._read()

    def current(self) -> Pem:
        """What the files hold now, or held when they could last be used."""
        with self._lock:
            seen = self._signatures()
            if seen != self._seen:
                self._seen = seen  # a mistake is reported once, not at every connection
                try:
                    self._pem = self._read()
                    logger.info("tls: %s and what goes with it have changed, and are used from now on", self._cert)
                except ConfigError as error:
                    logger.error("%s; what was there before stays in use", error)
            self._warn_of_end(self._pem)
            return self._pem

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a listener. Where there is a CA, callers must show a certificate of it."""
        given = self.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """gRPC asks before each handshake; None: nothing has changed."""
            nonlocal given
            pem = self.current()
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
        """For a channel to a peer, of which the CA must know, and which may ask for our certificate."""
        pem = self.current()
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)

    def _warn_of_end(self, pem: Pem) -> None:
        now = self._now()
        if pem.not_after - now < WARN_BEFORE_END and self._warned_on != now.date():
            self._warned_on = now.date()
            ends = "has ended" if pem.not_after <= now else "ends"
            logger.warning("tls: the certificate %s %s at %s", self._cert, ends, pem.not_after.isoformat())

    def _signatures(self) -> tuple[Signature | None, ...]:
        return tuple(signature(path) for path in (self._cert, self._key, self._ca) if path is not None)

    def _read(self) -> Pem:
        before = self._signatures()
        cert, key = read_file(self._cert, "tls_cert"), read_file(self._key, "tls_key")
        ca = None if self._ca is None else read_file(self._ca, "tls_ca")
        check_key_pair(self._cert, self._key)
        pem = Pem(cert, key, ca, _check_dates(cert, self._cert, self._now()))
        if pem.ca is not None:
            check_ca(pem.ca, str(self._ca))
        if self._signatures() != before:  # what was checked may not be what was read
            raise ConfigError(f"tls_cert: {self._cert} changed while it was read", field="tls_cert", value=self._cert)
        return pem


def read_identity(cert: Path | None, key: Path | None, ca: Path | None) -> Identity | None:
    """The identity that settings name with all three of the files; None with none. Else ConfigError."""
    files = {"tls_cert": cert, "tls_key": key, "tls_ca": ca}
    missing = [name for name, path in files.items() if path is None]
    if cert is None or key is None or ca is None:
        if len(missing) == len(files):
            return None
        raise ConfigError(f"{missing[0]}: give all of tls-cert, tls-key and tls-ca, or none", field=missing[0])
    return Identity(cert, key, ca)


def shard_dial(identity: Identity | None, name: str) -> Dial:
    """How to connect to shards: plainly, or as `identity` to certificates for `name`, or "" for the address's host."""
    if identity is None:
        return dial_plainly

    def dial(address: str) -> grpc.aio.Channel:
        options = [*channel_options(MAX_SHARD_MESSAGE_BYTES), *name_override(name)]
        return grpc.aio.secure_channel(address, identity.channel_credentials(), options=options)

    return dial


def read_names(text: str, field_name: str) -> frozenset[str]:
    """The names in "one,two"; ConfigError where there is none."""
    names = frozenset(part.strip().lower() for part in text.split(",")) - {""}
    if not names:
        raise ConfigError(f"{field_name}: no name in {text!r}", field=field_name, value=text)
    return names


def check_caller(
    context: grpc.aio.ServicerContext[Any, Any], allowed: Collection[str], field_name: str = "allow_peer"
) -> None:
    """Raises PermissionDenied unless one of the `allowed` names (of `read_names`) is on the caller's certificate.

    Its subject alternative names of the type DNS count, compared whole: a wildcard matches nothing. The handshake has
    seen to it that the certificate is valid, and of our CA.
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
    """The channel option by which the other side must be `name`, whatever the address; none for ""."""
    return [("grpc.ssl_target_name_override", name)] if name else []


def read_file(path: Path, field_name: str) -> bytes:
    """The file's bytes, or ConfigError, also for one that is too large to be what it is said to be."""
    try:
        data = read_bounded(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{field_name}: cannot read {path}: {error.strerror or error}", field=field_name, value=path
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{field_name}: {path} has more than {MAX_FILE_BYTES} bytes", field=field_name, limit=MAX_FILE_BYTES
        )
    return data


def check_key_pair(cert: Path, key: Path) -> None:
    """Raises ConfigError unless both are PEM and the key, which must not be encrypted, is the certificate's."""
    try:
        # Without a callback OpenSSL would ask the terminal for the password of an encrypted key.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise ConfigError(
            f"tls_cert: {cert} and {key} are no PEM certificate with its unencrypted key: {reason}",
            field="tls_cert",
            value=cert,
        ) from error


def _check_dates(pem: bytes, source: Path, now: datetime) -> datetime:
    """When the certificate ends. Raises ConfigError where it is not valid now, with its dates."""
    from cryptography import x509  # here: the SDK takes other functions of this file, and does without the package

    try:
        cert = x509.load_pem_x509_certificate(pem)
    except ValueError as error:  # it is stricter than OpenSSL is
        text = f"tls_cert: {source} is no PEM certificate: {str(error)[:200]}"
        raise ConfigError(text, field="tls_cert", value=source) from error
    begins, ends = cert.not_valid_before_utc, cert.not_valid_after_utc
    if not begins <= now < ends:
        raise ConfigError(
            f"tls_cert: {source} is valid from {begins.isoformat()} to {ends.isoformat()}; it is {now.isoformat()}",
            field="tls_cert",
            limit=f"{begins.isoformat()} to {ends.isoformat()}",
            value=now.isoformat(timespec="seconds"),
        )
    return ends


def check_ca(pem: bytes, source: str) -> None:
    """Raises ConfigError unless `pem` holds certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        text = f"tls_ca: {source} holds no PEM certificate: {reason}"
        raise ConfigError(text, field="tls_ca", value=source) from error


def _server_configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)

"""A certificate authority for one cluster, whose key is never written and is gone when this process ends.

So nobody can add to the certificates later: whoever finds the files can pose as one of the processes that they belong
to, but not as another. A cluster that is to grow needs an authority that is kept.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stagecoach.security.tls import ROUTER_NAME, SHARD_NAME

CA_FILE = "ca.pem"
LIFETIME = datetime.timedelta(days=365)
# Certificates are valid from a little before now, for machines whose clocks are behind.
CLOCK_SKEW = datetime.timedelta(hours=1)


class Issued(NamedTuple):
    """The files of one certificate."""

    cert: Path
    key: Path


class ClusterCertificates(NamedTuple):
    """What a router and its shards know each other by. All shards share one certificate."""

    ca: Path
    router: Issued
    shard: Issued


class ThrowawayCA:
    """Writes its own certificate (CA_FILE) and those that it issues to `folder`.

    The folder is made if it is absent, and then only this user may read it.
    """

    def __init__(self, folder: Path, *, lifetime: datetime.timedelta = LIFETIME) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("Stagecoach throw-away CA")
        self._lifetime = lifetime
        certificate = (
            self._builder(self._name, self._key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = folder / CA_FILE
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, hosts: Sequence[str] = (), lifetime: datetime.timedelta | None = None) -> Issued:
        """A certificate for `name` and for `hosts` (names or IP addresses), good for both sides of a connection.

        Writes NAME.pem, and NAME.key, which only this user may read. A `lifetime` counts from now.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(_name(name), key.public_key(), lifetime or self._lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName([_alternative_name(host) for host in dict.fromkeys([name, *hosts])]),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        issued = Issued(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        issued.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write_private(issued.key, pem)
        return issued

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


def issue_cluster(
    folder: Path, *, router_hosts: Sequence[str] = (), lifetime: datetime.timedelta = LIFETIME
) -> ClusterCertificates:
    """Certificates of a new authority, in `folder`. The router's is also for this machine and for `router_hosts`."""
    authority = ThrowawayCA(folder, lifetime=lifetime)
    hosts = ["localhost", "127.0.0.1", "::1", socket.gethostname(), *router_hosts]
    return ClusterCertificates(authority.ca, authority.issue(ROUTER_NAME, hosts=hosts), authority.issue(SHARD_NAME))


@contextlib.contextmanager
def throwaway_certificates(*, router_hosts: Sequence[str] = ()) -> Iterator[ClusterCertificates]:
    """As issue_cluster, in a folder that only this user may read and that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="stagecoach-tls-") as folder:
        yield issue_cluster(Path(folder), router_hosts=router_hosts)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])  # 64 is X.520's limit


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _write_private(path: Path, data: bytes) -> None:
    """Writes a file that nobody else may read, not even for the moment between its creation and a change of mode."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)

"""Reads certificates and keys from PEM files, and refuses what cannot be used with a ConfigError that says why."""

from __future__ import annotations

import ssl
from datetime import datetime
from pathlib import Path

from stagecoach.errors import ConfigError
from stagecoach.security.watched_files import read_bounded

# How large a file may be. A bundle of all CAs of the web has a quarter of it.
MAX_FILE_BYTES = 1 << 20


def read_file(path: Path, field_name: str) -> bytes:
    """The file's bytes. Raises ConfigError where it cannot be read, or is too large to be a PEM file."""
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
    """Raises ConfigError unless both are PEM, the key belongs to the certificate, and the key is not encrypted."""
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


def read_dates(pem: bytes, source: Path) -> tuple[datetime, datetime]:
    """From when until when the certificate is valid. Raises ConfigError for what is none."""
    from cryptography import x509  # not above: the SDK needs other functions of this file, and not the package

    try:
        cert = x509.load_pem_x509_certificate(pem)
    except ValueError as error:  # it is stricter than OpenSSL is
        text = f"tls_cert: {source} is no PEM certificate: {str(error)[:200]}"
        raise ConfigError(text, field="tls_cert", value=source) from error
    return cert.not_valid_before_utc, cert.not_valid_after_utc


def check_ca(pem: bytes, source: str) -> None:
    """Raises ConfigError unless `pem` holds certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        text = f"tls_ca: {source} holds no PEM certificate: {reason}"
        raise ConfigError(text, field="tls_ca", value=source) from error

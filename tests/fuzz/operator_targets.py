"""What a router reads of the files and lists that its operator gives it: the journal, API keys, PEM files, shards.

They are not a stranger's; but disks tear them, backups mix them up, and a folder may be writable for more than one.
"""

from __future__ import annotations

import contextlib
import datetime
import sqlite3
import struct
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from stagecoach import errors
from stagecoach.rpc.addresses import MAX_ADDRESSES, check_address, read_addresses
from stagecoach.sampling_params import SamplingParams
from stagecoach.security import tls
from stagecoach.security.api_keys import Grant, KeyEntry, write_entry
from stagecoach_router.durability.journal_records import read_request, read_sampled, write_logprobs, write_request
from stagecoach_router.durability.journal_store import Begin, End, JournalStore, Token
from stagecoach_router.requests.request import Request
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.tenants.key_file import KeyFile
from tests.fuzz.engine import Target

FINGERPRINT = "f00d"
VOCAB_SIZE, CONTEXT_LENGTH = 259, 512
_PARAMS = SamplingParams(
    temperature=0.7, logit_bias={5: 1.5}, seed=2**64 - 1, max_tokens=9, stop=("ä", "b"), stop_token_ids=(3,), n=2
)
_REQUEST = Request("r-1", (1, 2, 3), _PARAMS, priority=-4, cache_salt=b"\x00salt")
_SAMPLED = Sampled(8, -0.1, ((8, -0.1), (9, -2.5)))


def journal(scratch: Path) -> Target:
    """The file ("d"), a file with what is not yet in it beside it ("w"), and what lies in a row ("c", "l")."""
    path = scratch / "journal.sqlite"
    wal = path.with_name("journal.sqlite-wal")
    corpus = [
        *_journals(path, wal),
        b"c" + write_request(_REQUEST).encode(),
        b"c" + write_request(Request("r", (1,), SamplingParams(max_tokens=1))).encode(),
        b"l" + (write_logprobs(_SAMPLED) or "").encode(),
    ]

    def check(data: bytes) -> None:
        kind, data = data[:1], data[1:]
        if kind == b"c":
            request = read_request("r", data.decode("utf-8", "replace"), b"")
            assert read_request("r", write_request(request), b"") == request
        elif kind == b"l":
            read_sampled(5, data.decode("utf-8", "replace"))
        else:
            _lay_out(data, path, wal, beside=kind == b"w")
            _open_and_write(path)

    words = (
        b"SQLite format 3\x00", b"CREATE TABLE ", b"CREATE VIEW meta AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL",
        b"CREATE TRIGGER ", b"AFTER INSERT ON", b" CHECK (", b" GENERATED ALWAYS AS (", b"load_extension('x')", b"meta",
        b"requests", b"tokens", b"format", b"model", FINGERPRINT.encode(), b'"prompt_tokens": ', b'"params": ',
        b'"n": ', b'"logit_bias": [[', b"[" * 5000, b"9" * 5000, b"null", b"1e999", b"\x0d", b"\x05",
        b"\x02", b"\x0a",
        struct.pack(">I", 1), struct.pack(">I", 2), struct.pack(">I", 2**31 - 1), struct.pack(">H", 65535), b"\x83\x7f",
    )  # fmt: skip
    return Target("journal", corpus, check, words, share=4, max_s=2.0)


def _journals(path: Path, wal: Path) -> list[bytes]:
    """A file of small pages, so that a change hits something; a larger one; one with a log beside it."""
    made = []
    for page_size, num_tokens, closed in ((512, 2, True), (512, 200, True), (4096, 9, True), (512, 30, False)):
        for file in (path, wal):
            file.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA page_size = {page_size}")
            db.execute("VACUUM")
        store = JournalStore(path)
        store.check_model(FINGERPRINT)
        key, other = ("ann", "r-1"), ("", "r-2")
        store.apply([Begin(key, b"digest", _REQUEST), Begin(other, b"another", _REQUEST)])
        store.apply([Token(key, 0, position, Sampled(7, None, ())) for position in range(num_tokens)])
        store.apply([Token(other, 1, 0, _SAMPLED), End(other, 2e9)])
        if closed:
            store.close()
            made.append(b"d" + path.read_bytes())
        else:
            made.append(b"w" + struct.pack("<I", path.stat().st_size) + path.read_bytes() + wal.read_bytes())
            store.close()
    return made


def _lay_out(data: bytes, path: Path, wal: Path, *, beside: bool) -> None:
    for name in ("-journal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    wal.unlink(missing_ok=True)
    if beside:
        size = int.from_bytes(data[:4], "little")
        wal.write_bytes(data[4 + size :])
        data = data[4 : 4 + size]
    path.write_bytes(data)


def _open_and_write(path: Path) -> None:
    """What a router does with it, on this thread."""
    with contextlib.closing(JournalStore(path)) as store:
        store.check_model(FINGERPRINT)
        store.drop_finished_before(1e9)
        left = store.load()
        for entry in left:
            with contextlib.suppress(errors.StagecoachError):
                entry.check(vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)
        with contextlib.suppress(sqlite3.Error):  # the journal gives the file up, and no answer
            store.apply([Begin(("", "new"), b"", _REQUEST), Token(("", "new"), 0, 0, _SAMPLED), End(("", "new"), 3e9)])


def key_file(scratch: Path) -> Target:
    """The file of API keys, as bytes."""
    path = scratch / "keys.toml"
    grant = Grant(requests_per_minute=60, tokens_per_minute=10, max_concurrent=2, models=("m", "ü"), max_priority=-1)
    entries = [KeyEntry("ann", "0" * 16, "a" * 64, grant), KeyEntry("bob", "1" * 16, "b" * 64)]
    texts = [write_entry(entries[0]), "".join(map(write_entry, entries)), "# nobody\n" + write_entry(entries[1])]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        tenants = KeyFile(path).tenants
        tenants.former("ann").charge(10**9, 1e9)

    words = (
        b"[[keys]]\n",
        b"name = ",
        b"sha256 = ",
        b"models = [",
        b"'''",
        b"[" * 5000,
        b"1e99",
        b"inf",
        b"\r",
        b"\xff",
    )
    return Target("key_file", [text.encode() for text in texts], check, words, share=4)


def pem(scratch: Path) -> Target:
    """A process's certificate ("c"), its key ("k") or its CA ("a"), where the other two are good."""
    good = dict(zip(b"cka", _certificates(), strict=True))
    paths = {kind: scratch / f"{chr(kind)}.pem" for kind in good}

    def check(data: bytes) -> None:
        for kind, text in good.items():
            paths[kind].write_bytes(data[1:] if data[:1] == bytes([kind]) else text)
        identity = tls.Identity(paths[b"c"[0]], paths[b"k"[0]], paths[b"a"[0]])
        assert identity.current.ca

    corpus = [bytes([kind]) + text for kind, text in good.items()]
    corpus.append(b"a" + good[b"a"[0]] + b"a comment between\n" + good[b"c"[0]])
    words = (
        b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n", b"-----BEGIN PRIVATE KEY-----\n",
        b"-----END PRIVATE KEY-----\n", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n",
        b"-----BEGIN RSA PRIVATE KEY-----\n",
        b"-----BEGIN EC PARAMETERS-----\n", b"-----BEGIN DH PARAMETERS-----\n", b"Proc-Type: 4,ENCRYPTED\n",
        b"DEK-Info: AES-256-CBC,00\n", b"MII", b"====", b"\x00", b"\x80", b"\xef\xbb\xbf", b"A" * 70,
    )  # fmt: skip
    return Target("pem", corpus, check, words, share=4)


def _certificates() -> tuple[bytes, bytes, bytes]:
    """A certificate, its key, its CA: always the same, as inputs are to follow from their numbers."""
    ca_key, key = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("a CA", tls.SHARD_NAME)]
    certificates = []
    for name, holder, number in zip(names, (ca_key, key), (1, 2), strict=True):
        builder = x509.CertificateBuilder(
            issuer_name=names[0],
            subject_name=name,
            public_key=holder.public_key(),
            serial_number=number,
            not_valid_before=datetime.datetime(2026, 1, 1),
            not_valid_after=datetime.datetime(2126, 1, 1),
        ).add_extension(x509.BasicConstraints(ca=number == 1, path_length=None), critical=True)
        certificates.append(builder.sign(ca_key, None).public_bytes(Encoding.PEM))
    return certificates[1], key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), certificates[0]


def shards(scratch: Path) -> Target:
    """The list of shards, as flags, files and variables bring it."""
    corpus = [
        "127.0.0.1:50051",
        "a:1,b:2",
        " [::1]:80 , host.example:65535,10.0.0.7:1",
        ",".join(f"s{i}:9" for i in range(99)),
    ]

    def check(data: bytes) -> None:
        try:
            addresses = read_addresses(data.decode("utf-8", "surrogateescape"), "shards")
        except errors.StagecoachError as error:
            errors.to_trailing_metadata(error)
            raise
        assert 1 <= len(set(addresses)) == len(addresses) <= MAX_ADDRESSES
        for address in addresses:
            check_address(address, "shards")

    words = (
        b",",
        b" , ",
        b",,",
        b":",
        b"[",
        b"]",
        b"0",
        b"65536",
        b"://",
        b"a:1,",
        b"a:1," * 2000,
        b"\xed\xa0\x80",
        b"\n",
    )
    return Target("shards", [text.encode() for text in corpus], check, words, share=12)

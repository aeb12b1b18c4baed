"""Where a process is told to listen: on every address of the host, or on none."""

from __future__ import annotations

import socket
from pathlib import Path

from stagecoach import errors
from stagecoach.process.listen_addresses import listen_addresses
from stagecoach.rpc.addresses import check_address, split_address
from tests.fuzz.engine import Target

IPS = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
TAKEN = IPS[1:3]  # PORT, by another process


def listen(scratch: Path) -> Target:
    """A byte that says which of four addresses names stand for, and HOST:PORT, where PORT is taken on two of them."""
    taken, port = _take()

    def check(data: bytes) -> None:
        ips = [ip for bit, ip in enumerate(IPS) if data[:1] and data[0] >> bit & 1]
        asked: list[str] = []

        def resolve(host: str) -> list[str]:
            asked.append(host)
            if not ips:
                raise socket.gaierror("no such name")
            return ips

        address = data[1:].decode("utf-8", "surrogateescape").replace("PORT", str(port))
        try:
            got = [split_address(each, "listen") for each in listen_addresses(_checked(address), resolve)]
        except errors.StagecoachError as error:
            errors.to_trailing_metadata(error)
            raise
        assert taken, "they are held as long as the target is"
        assert len({each_port for _, each_port in got}) == 1
        if asked:
            assert [host for host, _ in got] == ips
            assert got[0][1] != port or not set(ips) & set(TAKEN)

    corpus = [bytes([mask]) + text for mask in range(16) for text in (b"name:PORT", b"name:0")]
    corpus += [
        b"\x01" + text for text in (b"127.0.0.1:0", b"[::1]:0", b"localhost:0", b"0.0.0.0:PORT", b"127.0.0.2:PORT")
    ]
    words = (b"PORT", b"localhost", b"0.0.0.0", b"[::]", b"[::ffff:127.0.0.2]", b"%lo", b"65535", b":", b"127.0.0.3")
    return Target("listen", corpus, check, words, share=2, max_input_bytes=300)


def _checked(address: str) -> str:
    return check_address(address, "listen", listening=True)


def _take() -> tuple[list[socket.socket], int]:
    """One port on all TAKEN addresses."""
    first = socket.create_server((TAKEN[0], 0))
    port = first.getsockname()[1]
    return [first, *(socket.create_server((ip, port)) for ip in TAKEN[1:])], port

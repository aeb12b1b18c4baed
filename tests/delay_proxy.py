"""Far machines on this one: a TCP proxy that delays what passes, each way, and leaves the bandwidth as it is.

As a program it is one proxy for each LISTEN=TARGET, in a process of its own; it says "ready" when they listen, and a
line with a number of seconds on its standard input is the new delay of all of them:

    python -m tests.delay_proxy --delay-s 0.01 127.0.0.1:6001=127.0.0.1:5001 127.0.0.1:6002=127.0.0.1:5002
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import sys
from collections import deque
from typing import Literal, cast

import uvloop

# Of what is under way, in one direction of one connection; who sends more waits, as with a network's buffers.
MAX_BYTES_UNDER_WAY = 256 << 20

Direction = Literal["to_target", "from_target"]


class _Line(asyncio.Protocol):
    """One direction of a connection: what comes in leaves after the delay, in order. None: the end."""

    def __init__(self, proxy: DelayProxy, direction: Direction) -> None:
        self.far: asyncio.Transport | None = None
        self._proxy = proxy
        self._direction = direction
        self._near: asyncio.Transport | None = None
        self._under_way: deque[tuple[float, bytes | None]] = deque()  # (when it is due, what)
        self._num_bytes = 0
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._near = near = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        near.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._proxy.opened(self, near)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        self._put(data)
        if self._num_bytes > MAX_BYTES_UNDER_WAY and self._near is not None and not self._paused:
            self._near.pause_reading()
            self._paused = True

    def eof_received(self) -> bool:
        self._put(None)
        return True  # the other direction may go on

    def connection_lost(self, _: Exception | None) -> None:
        self._put(None)
        self._proxy.closed(self)

    def _put(self, data: bytes | None) -> None:
        loop = asyncio.get_running_loop()
        self._under_way.append((loop.time() + self._proxy.delay_s, data))
        self.forward()

    def forward(self) -> None:
        """Passes on what is due, and comes back for what is not."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        far = self.far
        while far is not None and self._under_way and self._direction not in self._proxy.stalled:
            due_s, data = self._under_way[0]
            if due_s > loop.time():
                self._timer = loop.call_at(due_s, self.forward)
                return
            self._under_way.popleft()
            if data is not None:
                self._num_bytes -= len(data)
                if not far.is_closing():  # else nobody is there to read it
                    far.write(data)
            elif not far.is_closing():
                with contextlib.suppress(OSError):
                    far.write_eof()
                if self._near is None or self._near.is_closing():
                    far.close()
        if self._paused and self._num_bytes <= MAX_BYTES_UNDER_WAY // 2 and self._near is not None:
            self._near.resume_reading()
            self._paused = False


class DelayProxy:
    """Listens, and connects every caller with `target`, HOST:PORT. `delay_s` each way may be changed at any time.

    `stall(direction)` stops forwarding in one direction, in all connections and new ones, and loses nothing: `resume`
    lets go on what has piled up. Connections stay open meanwhile, as with a machine that hangs or a cable that is cut.
    """

    def __init__(self, target: str, *, delay_s: float = 0.0, listen: str = "127.0.0.1:0") -> None:
        assert delay_s >= 0, delay_s
        self.delay_s = delay_s
        self.address = listen
        self.stalled: set[Direction] = set()
        self._target = _split(target)
        self._lines: dict[_Line, asyncio.Transport] = {}
        self._server: asyncio.Server | None = None
        self._connecting: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens; `address` says where."""
        host, port = _split(self.address)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Line(self, "to_target"), host, port)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Ends all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connecting):
            task.cancel()
        for transport in list(self._lines.values()):
            transport.abort()

    def stall(self, direction: Direction) -> None:
        self.stalled.add(direction)

    def resume(self, direction: Direction) -> None:
        self.stalled.discard(direction)
        for line in list(self._lines):
            line.forward()

    async def __aenter__(self) -> DelayProxy:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def opened(self, line: _Line, transport: asyncio.Transport) -> None:
        """A line's near end is there. A caller's then needs the target's."""
        self._lines[line] = transport
        if line.far is None:
            task = asyncio.ensure_future(self._connect(line, transport))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def closed(self, line: _Line) -> None:
        self._lines.pop(line, None)

    async def _connect(self, line: _Line, caller: asyncio.Transport) -> None:
        back = _Line(self, "from_target")
        back.far = caller
        try:
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: back, *self._target)
        except OSError:
            caller.abort()
            return
        line.far = transport
        line.forward()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


async def _serve(pairs: list[str], delay_s: float) -> None:
    proxies = []
    for pair in pairs:
        listen, _, target = pair.partition("=")
        proxies.append(DelayProxy(target, delay_s=delay_s, listen=listen))
        await proxies[-1].start()
    print("ready", flush=True)  # noqa: T201
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):  # its end is ours
        for proxy in proxies:
            proxy.delay_s = float(line)
        print("set", flush=True)  # noqa: T201
    for proxy in proxies:
        await proxy.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="LISTEN=TARGET", help="HOST:PORT=HOST:PORT")
    parser.add_argument("--delay-s", type=float, default=0.0, help="each way")
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.pairs, arguments.delay_s))


if __name__ == "__main__":
    main()

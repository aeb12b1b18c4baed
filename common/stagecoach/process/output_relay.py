"""Writes the lines of several processes to one output that may be slow, full, stopped or gone, and never waits for it.

Whoever has something to say puts it into a queue, from which one thread writes. What finds the queue full, or cannot be
written, is dropped and counted, and the count is written when writing works again. So a terminal that was stopped with
ctrl-S, a full disk or `| head` costs log lines, and no process.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

MAX_WAITING_LINES = 1000
_CLOSE_TIMEOUT_S = 1.0

# Writes one thing. Raises OSError, or ValueError if the output was closed.
Write = Callable[[], None]


class OutputRelay:
    """Calls the writes that it is given, in order and on a thread of its own.

    `write_dropped(count)` is called to write how many of them were left out.
    """

    def __init__(self, write_dropped: Callable[[int], None], max_waiting: int = MAX_WAITING_LINES) -> None:
        self._write_dropped = write_dropped
        # An event is set when what was put before it is written, and None ends the thread.
        self._waiting: queue.Queue[Write | threading.Event | None] = queue.Queue(max_waiting)
        self._lock = threading.Lock()
        self._num_dropped = 0
        # A daemon, so that the process can end even while a write to a stopped terminal hangs.
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def put(self, write: Write) -> None:
        """Has `write` called soon, or counts it as dropped. Returns at once."""
        try:
            self._waiting.put_nowait(write)
        except queue.Full:
            self._drop(1)

    def drain(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Returns when everything that was put before has been written, and after `timeout_s` in any case."""
        end_s = time.monotonic() + timeout_s
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._waiting.put(written, timeout=timeout_s)
            written.wait(max(0.0, end_s - time.monotonic()))

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Returns when everything has been written, and after `timeout_s` in any case."""
        end_s = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=timeout_s)
            self._thread.join(max(0.0, end_s - time.monotonic()))

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, threading.Event):
                self._write(_nothing)
                item.set()
            else:
                self._write(item)
        self._write(_nothing)

    def _write(self, write: Write) -> None:
        num_dropped = self._take_dropped()
        try:
            if num_dropped:
                self._write_dropped(num_dropped)
                num_dropped = 0
            write()
        except (OSError, ValueError):
            self._drop(num_dropped + (write is not _nothing))

    def _drop(self, count: int) -> None:
        with self._lock:
            self._num_dropped += count

    def _take_dropped(self) -> int:
        with self._lock:
            num_dropped, self._num_dropped = self._num_dropped, 0
        return num_dropped


def _nothing() -> None:
    """Written for the sake of the count that goes before it: what was dropped last is said, too."""

"""Writes a process's log without ever waiting for where it goes.

Standard error may be a terminal that was stopped, a pipe that nobody reads, or a file on a disk that is gone. What an
event loop writes there by itself stops that loop, and with it everything that the process serves.
"""

from __future__ import annotations

import logging
import os

from stagecoach.process.output_relay import OutputRelay


class RelayHandler(logging.Handler):
    """Has a thread write the lines, and drops and counts those for which there is no room."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._relay = OutputRelay(lambda count: self._write(f"({count} lines of the log could not be written)"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # a mistake in a log call, which the logging module reports by itself
            self.handleError(record)
            return
        self._relay.put(lambda: self._write(line))

    def flush(self) -> None:
        """Returns when everything is written, or that takes too long. Called at the end of the process."""
        self._relay.drain()

    def _write(self, line: str) -> None:
        data = memoryview(f"{line}\n".encode(errors="backslashreplace"))
        while data:
            data = data[os.write(self._descriptor, data) :]

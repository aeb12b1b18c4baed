"""A child process: its output is read, its end noticed, and it does not outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagecoach.errors import ConfigError, StagecoachError
from stagecoach_local import die_with_parent

NUM_KEPT_LINES = 20
_READER_JOIN_TIMEOUT_S = 1.0


class ProcessDied(StagecoachError):
    """A process that should run has ended; the message holds the last lines of its output."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that is over."""

    name: str
    pid: int
    status: int  # minus the signal's number where a signal ended it
    last_lines: tuple[str, ...]  # of its output

    def died(self, why_final: str | None = None) -> ProcessDied:
        """The error to raise; `why_final` goes on with the sentence that says how it ended."""
        text = f"{self.name} (pid {self.pid}) {describe_exit(self.status)}"
        text += f", {why_final}" if why_final else ""
        lines = "".join(f"\n  {line}" for line in self.last_lines)
        return ProcessDied(f"{text}; its last lines:{lines}" if lines else text, field=self.name, value=self.status)


class ChildProcess:
    """Runs `command` in a session of its own, so that a ctrl-C in the terminal reaches only us.

    `on_line(name, line)` gets its output, from another thread. On Linux the child is killed when this process dies,
    however it dies.
    """

    def __init__(self, name: str, command: Sequence[str], on_line: Callable[[str, str], None] | None = None) -> None:
        self.name = name
        self._command = list(command)
        self._on_line = on_line
        self._last_lines: deque[str] = deque(maxlen=NUM_KEPT_LINES)
        self._started = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._start_error: OSError | None = None
        # It also starts the child: the kernel's watch is on the thread that did, and this one lives as long as it.
        self._reader = threading.Thread(target=self._run, name=f"output of {name}", daemon=True)

    def start(self) -> None:
        """Starts it; raises ConfigError where that cannot be done."""
        try:
            self._reader.start()
        except RuntimeError as error:  # there can be no more threads just now
            raise self._not_started(error) from error
        self._started.wait()
        if self._start_error is not None:
            raise self._not_started(self._start_error)

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; minus the signal's number where a signal ended it."""
        return self._running().poll()

    def ended(self) -> Ended | None:
        """How it ended; None while it runs."""
        status = self.exit_status
        if status is None:
            return None
        self._reader.join(_READER_JOIN_TIMEOUT_S)  # its last words
        return Ended(self.name, self.pid, status, tuple(self._last_lines))

    def check(self) -> None:
        """Raises ProcessDied unless it runs."""
        if (ended := self.ended()) is not None:
            raise ended.died()

    def terminate(self) -> None:
        """Asks it to end."""
        self._running().terminate()

    def kill(self) -> None:
        """Ends it, and waits until it has ended."""
        process = self._running()
        process.kill()
        process.wait()
        self._reader.join(_READER_JOIN_TIMEOUT_S)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within `timeout_s`."""
        try:
            self._running().wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join(_READER_JOIN_TIMEOUT_S)
        return True

    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None, "not started"
        return self._process

    def _not_started(self, error: Exception) -> ConfigError:
        return ConfigError(f"cannot start {self.name}: {error}", field="command", value=self._command[0])

    def _run(self) -> None:
        command = self._command
        if sys.platform == "linux":
            guard = [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid())]
            command = [*guard, *command]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            self._start_error = error
            self._started.set()
            return
        self._process = process
        self._started.set()
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                self._take(line.rstrip())
        process.wait()

    def _take(self, line: str) -> None:
        self._last_lines.append(line)
        if self._on_line is not None:
            self._on_line(self.name, line)


def describe_exit(status: int) -> str:
    """As the end of a sentence; `status` is minus the signal's number where a signal ended the process."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"

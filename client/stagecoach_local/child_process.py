"""A child process whose output is read, whose end is noticed, and which does not outlive this process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence

from stagecoach.errors import ConfigError
from stagecoach_local import die_with_parent
from stagecoach_local.process_exit import Ended

NUM_KEPT_LINES = 20
MAX_LINE_LENGTH = 1 << 16  # characters; a longer line is taken for several
_READER_JOIN_TIMEOUT_S = 1.0


class ChildProcess:
    """Runs `command` in a session of its own, so that a ctrl-C in the terminal does not reach it.

    `on_line(name, line)` is called with each line of its output, from another thread; it must not wait for anything,
    and what it raises costs the line. On Linux the child is killed when this process dies, however that happens.
    """

    def __init__(self, name: str, command: Sequence[str], on_line: Callable[[str, str], None] | None = None) -> None:
        self.name = name
        self._command = list(command)
        self._on_line = on_line
        self.num_lost_lines = 0  # that `on_line` did not take
        self._last_lines: deque[str] = deque(maxlen=NUM_KEPT_LINES)
        self._started = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._start_error: OSError | None = None
        # This thread also starts the child. The kernel ends the child with the thread that started it, and this one
        # lives as long as the child does.
        self._reader = threading.Thread(target=self._run, name=f"output of {name}", daemon=True)

    def start(self) -> None:
        """Starts the process. Raises ConfigError if that cannot be done."""
        try:
            self._reader.start()
        except RuntimeError as error:  # the system has no more threads to give
            raise self._not_started(error) from error
        self._started.wait()
        if self._start_error is not None:
            raise self._not_started(self._start_error)

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; minus the signal's number if a signal ended it."""
        return self._running().poll()

    def ended(self) -> Ended | None:
        """How the process ended; None while it runs."""
        status = self.exit_status
        if status is None:
            return None
        self._reader.join(_READER_JOIN_TIMEOUT_S)  # its last words
        return Ended(self.name, self.pid, status, tuple(self._last_lines))

    def check(self) -> None:
        """Raises ProcessDied if the process has ended."""
        if (ended := self.ended()) is not None:
            raise ended.died()

    def terminate(self) -> None:
        """Asks the process to end."""
        self._running().terminate()

    def kill(self) -> None:
        """Ends the process at once, and returns when it has ended."""
        process = self._running()
        process.kill()
        process.wait()
        self._reader.join(_READER_JOIN_TIMEOUT_S)

    def wait(self, timeout_s: float) -> bool:
        """Waits for its end, for `timeout_s` at most. Returns whether it has ended."""
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
            while line := output.readline(MAX_LINE_LENGTH):
                self._take(line.rstrip())
        process.wait()

    def _take(self, line: str) -> None:
        self._last_lines.append(line)
        if self._on_line is None:
            return
        try:
            self._on_line(self.name, line)
        except Exception:
            # Whatever is wrong with a line's receiver, reading goes on: the kernel ends the child with this thread.
            self.num_lost_lines += 1

"""A process with a supervisor: who is killed is started again at once, with the same command on the same port."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from stagecoach_local.child_process import ChildProcess
from stagecoach_local.process_exit import ProcessDied

KILL_TIMEOUT_S = 20.0


class Supervised:
    """Runs `command`, which serves `address`, and keeps what all of its incarnations print."""

    def __init__(self, name: str, address: str, command: Sequence[str]) -> None:
        self.name = name
        self.address = address
        self.lines: list[str] = []
        self.num_kills = 0
        self._command = command
        self._child: ChildProcess | None = None

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> None:
        """Starts it, for the first time or after `kill`."""
        if self._child is not None and not self._child.wait(KILL_TIMEOUT_S):
            raise ProcessDied(f"{self.name} does not end when it is killed")
        self._child = ChildProcess(self.name, self._command, lambda _, line: self.lines.append(line))
        self._child.start()

    def check(self) -> None:
        """Raises ProcessDied where it has ended, and nobody killed it."""
        self._running().check()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL. It stays dead until `start`."""
        self.check()
        self.num_kills += 1
        self.signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends it for good."""
        if self._child is not None:
            self._child.kill()

    def _running(self) -> ChildProcess:
        assert self._child is not None, "not started"
        return self._child


def kill_and_restart(*processes: Supervised) -> None:
    """SIGKILL for all of them at once; each is started again when it has ended."""
    for process in processes:
        process.kill()
    for process in processes:
        process.start()

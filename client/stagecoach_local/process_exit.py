"""How a process ended: its exit status and its last words, and what can be told from them. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from stagecoach.errors import StagecoachError

# How our servers end (stagecoach.process.lifecycle). A wrong command line has a status of its own. An error that
# somebody has to act on shares its status with a crash in Python, but its last line has the mark in it.
_WRONG_USAGE = 2
_ERROR = 1
_ERROR_MARK = ": error: "
# Such an error, but one that passes: whoever has the port lets it go, perhaps soon.
_PORT_IS_TAKEN = "cannot listen on"
# Signals that come from outside. Others, such as SIGSEGV, are what a crash looks like. A server that is told
# to stop ends with status 0.
_SIGNALS_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ProcessDied(StagecoachError):
    """A process that should run has ended. The message holds the last lines of its output; `ended` has the facts."""

    def __init__(self, message: str, *, ended: Ended | None = None) -> None:
        super().__init__(message, field=ended.name if ended else "", value=ended.status if ended else "")
        self.ended = ended


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended by itself."""

    name: str
    pid: int
    status: int  # minus the signal's number if a signal ended it
    last_lines: tuple[str, ...]  # of its output

    @property
    def port_was_taken(self) -> bool:
        """Whether it ended because somebody else had the port that it was to listen on."""
        return any(_PORT_IS_TAKEN in line for line in self.last_lines)

    @property
    def was_killed(self) -> bool:
        """Whether somebody else ended it: by a signal, or because it was told to stop and did."""
        return self.status == 0 or -self.status in _SIGNALS_FROM_OUTSIDE

    @property
    def was_misused(self) -> bool:
        """Whether it does not know its own command line. Whatever else changes, it would end in the same way again."""
        return self.status == _WRONG_USAGE

    @property
    def was_mistaken(self) -> bool:
        """Whether it ended because of its settings or of what they name, as the memory or the disk that is there.

        One that has never come up would end in the same way again. For another this may pass as it has come.
        """
        if self.was_misused:
            return True
        is_error = self.status == _ERROR and bool(self.last_lines) and _ERROR_MARK in self.last_lines[-1]
        return is_error and not self.port_was_taken

    def died(self, consequence: str = "") -> ProcessDied:
        """The error to raise. A `consequence` completes the sentence that says how the process ended."""
        text = f"{self.name} (pid {self.pid}) {describe_exit(self.status)}"
        text += f", {consequence}" if consequence else ""
        lines = "".join(f"\n  {line}" for line in self.last_lines)
        return ProcessDied(f"{text}; its last lines:{lines}" if lines else text, ended=self)


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process took it that its cluster was stopped."""

    name: str
    status: int  # minus the signal's number if a signal ended it
    killed: bool  # by us, because it had not ended in time

    @property
    def clean(self) -> bool:
        """Whether it ended by itself, in time and with status 0."""
        return self.status == 0 and not self.killed

    def __str__(self) -> str:
        return f"{self.name} " + ("did not stop in time and was killed" if self.killed else describe_exit(self.status))


def describe_exit(status: int) -> str:
    """The end of a sentence that begins with a process's name. A `status` below 0 is minus a signal's number."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"

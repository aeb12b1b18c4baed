"""The files that a process is started with: standard input, output and error, of which some may be closed."""

from __future__ import annotations

import contextlib
import os
import stat
import sys


def open_closed_streams() -> None:
    """Opens /dev/null in the place of each that is closed, as after `2>&-`. To be called before other files are opened.

    Whatever is opened first would else get its number: a socket to which Python writes its errors, or one that libuv
    will not close, and ends the process for.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(descriptor, True)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def own_standard_error() -> int:
    """A descriptor for whoever can wait, and from now on nobody waits who writes to standard error itself.

    That is gRPC, which writes there from the threads by which everything is sent and received, and which any stranger
    can make write by a handshake that fails. What finds no room is lost then. Standard error is opened anew for that,
    because how one may write belongs to the opened file, which other processes have, too. Where that cannot be done (a
    socket, somebody else's terminal, no /proc) all stays as it is, and so it does for a file, which nobody has to read.
    """
    own = os.dup(2)
    if not stat.S_ISREG(os.fstat(2).st_mode):
        with contextlib.suppress(OSError):
            anew = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.dup2(anew, 2)
            os.close(anew)
    return own

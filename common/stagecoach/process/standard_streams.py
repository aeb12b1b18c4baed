"""The files that a process is started with: standard input, output and error, of which some may be closed."""

from __future__ import annotations

import os
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

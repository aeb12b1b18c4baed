"""What tells a command to stop: ctrl-C, SIGTERM, and SIGHUP, which comes when its terminal is closed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_stop_signals(do: Callable[[int, FrameType | None], object]) -> None:
    """Has each of them call `do`.

    SIGINT is handled even where it was ignored at the start, as in a script's background job, for which it would
    otherwise be lost. SIGHUP stays ignored where it was: that is what nohup asks for.
    """
    for number in STOP_SIGNALS:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, do)


def interrupt_on_stop_signals() -> None:
    """Has each of them raise KeyboardInterrupt, so that what was begun is also ended."""
    on_stop_signals(_interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt

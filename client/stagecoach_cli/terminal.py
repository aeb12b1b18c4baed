"""How we write to a terminal."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Wide enough that no column of our tables is cut where there is no terminal to fit.
_WIDTH_WITHOUT_TERMINAL = 160
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def make_console() -> Console:
    """A console on standard output that prints text as it is."""
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False, markup=False, emoji=False
    )


def write_model_text(text: str) -> None:
    """Writes what a model wrote, at once. A terminal does not get the control sequences that may be in it."""
    sys.stdout.write(without_control(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def without_control(text: str) -> str:
    """The text less its control characters, but for tabs and line ends."""
    return _CONTROL.sub("", text)


def format_bytes(count: int) -> str:
    """With a binary unit, for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_fraction(fraction: float | None) -> str:
    """As a percentage; "-" for None."""
    return "-" if fraction is None else f"{fraction:.0%}"

"""Reading from and writing to a terminal."""

from __future__ import annotations

import os
import re
import sys
from typing import IO, TYPE_CHECKING

from stagecoach.errors import InvalidArgument, StagecoachError

if TYPE_CHECKING:
    from rich.console import Console

# Characters. Without a terminal to fit into, no column of our tables is cut at this width.
_WIDTH_WITHOUT_TERMINAL = 160
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def make_console() -> Console:
    """A console on standard output that prints text as it is, without marking anything up."""
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False, markup=False, emoji=False
    )


def write_model_text(text: str) -> None:
    """Writes text of a model at once. On a terminal, control sequences in it are left out."""
    sys.stdout.write(without_control(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_at_once(file: IO[str], text: str) -> None:
    """Writes the text past the file's buffer, so that nothing of what cannot be written is left there.

    Raises OSError, also where a reader has gone away.
    """
    file.flush()
    data = memoryview(text.encode(getattr(file, "encoding", None) or "utf-8", "replace"))
    while data:
        data = data[os.write(file.fileno(), data) :]


def without_control(text: str) -> str:
    """The text without its control characters; tabs and line ends stay."""
    return _CONTROL.sub("", text)


def format_bytes(count: int) -> str:
    """A number of bytes for people to read, with a binary unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_fraction(fraction: float | None) -> str:
    """A percentage, or "-" for None."""
    return "-" if fraction is None else f"{fraction:.0%}"


def not_text(error: UnicodeDecodeError, field: str) -> InvalidArgument:
    """The error to raise for standard input that cannot be decoded."""
    text = f"standard input is not {error.encoding}: {error.reason} at byte {error.start}"
    return InvalidArgument(text, field=field, value=error.start)


def describe(error: StagecoachError) -> str:
    """The error's message, followed by its field and its limit unless the message names them."""
    facts = [
        f"{name} {value}"
        for name, value in (("field", error.field), ("limit", error.limit))
        if value and value not in error.message
    ]
    return f"{error.message} ({', '.join(facts)})" if facts else error.message

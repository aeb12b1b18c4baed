"""The `stagecoach` command.

Each subcommand has a file of its name. Whatever is slow to import is imported inside of the function that needs it, so
that the command starts fast.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence

from stagecoach.errors import StagecoachError
from stagecoach.process.standard_streams import open_closed_streams
from stagecoach.visible_text import visible

# Why standard output takes nothing: the disk is full or broken, or nobody reads it.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EAGAIN, errno.EBADF)


def main() -> None:
    """The entry point of the `stagecoach` command."""
    open_closed_streams()
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: the stagecoach command needs {error.name}: install Stagecoach with its [cli] extra")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line. Returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 after ctrl-C."""
    from stagecoach_cli.terminal import describe

    try:
        status = _run(arguments)
        sys.stdout.flush()
    except StagecoachError as error:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        print(visible(f"error: {describe(error)}", keep="\n\t"), file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        _drop_output()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return status


def _run(arguments: Sequence[str]) -> int:
    from stagecoach_cli.app import app

    try:
        app(arguments, prog_name="stagecoach")
    except KeyboardInterrupt:  # typer handles it itself, except when it comes late
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _drop_output() -> None:
    """Has what is left in the buffer of standard output written to nowhere: at its end, Python would try once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

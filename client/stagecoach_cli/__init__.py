"""The `stagecoach` command.

Each subcommand has a file of its name. Whatever is slow to import is imported inside of the function that needs it, so
that the command starts fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stagecoach.errors import StagecoachError
from stagecoach.process.standard_streams import open_closed_streams


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
    from stagecoach_cli.app import app
    from stagecoach_cli.terminal import describe

    try:
        app(arguments, prog_name="stagecoach")
    except StagecoachError as error:
        sys.stdout.flush()
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # typer handles it itself, except when it comes late
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0

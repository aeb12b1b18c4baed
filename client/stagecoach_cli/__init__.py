"""The `stagecoach` command. Each file is one subcommand; what is slow to import is imported inside of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stagecoach.errors import StagecoachError


def main() -> None:
    """The entry point."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: the stagecoach command needs {error.name}: install Stagecoach with its [cli] extra")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line. Returns the exit status: 1 for an error, 2 for wrong usage, 130 after ctrl-C."""
    from stagecoach_cli.app import app

    try:
        app(arguments, prog_name="stagecoach")
    except StagecoachError as error:
        sys.stdout.flush()
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # one that came after typer's own handling of it
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def describe(error: StagecoachError) -> str:
    """The error's message, with its field and limit where the message does not name them."""
    facts = [
        f"{name} {value}"
        for name, value in (("field", error.field), ("limit", error.limit))
        if value and value not in error.message
    ]
    return f"{error.message} ({', '.join(facts)})" if facts else error.message

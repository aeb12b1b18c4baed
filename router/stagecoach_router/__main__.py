"""`stagecoach-router`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

PROGRAM = "stagecoach-router"


def main() -> None:
    """Reads the settings first: a mistake in them, or --help, need not wait for what is slow to import."""
    with _the_extra():
        from stagecoach.process.logs import configure_logging
        from stagecoach.process.settings import read_settings
        from stagecoach.process.standard_streams import open_closed_streams
        from stagecoach_router.settings import RouterSettings
    open_closed_streams()
    settings = read_settings(RouterSettings, PROGRAM, sys.argv[1:], "STAGECOACH_ROUTER_")
    configure_logging(settings.log_level)
    with _the_extra():
        from stagecoach.process import lifecycle
        from stagecoach_router.server import serve
    sys.exit(lifecycle.run(PROGRAM, lambda stop: serve(settings, stop)))


@contextlib.contextmanager
def _the_extra() -> Iterator[None]:
    """The bare install has this command, too, but not what it needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f"{PROGRAM}: error: {error.name} is missing: install Stagecoach with its [router] extra")


if __name__ == "__main__":
    main()

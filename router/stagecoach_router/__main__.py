"""`stagecoach-router`."""

from __future__ import annotations

import sys

from stagecoach.config import read_settings
from stagecoach.telemetry import configure_logging
from stagecoach_router.settings import RouterSettings

PROGRAM = "stagecoach-router"


def main() -> None:
    """Reads the settings first: a mistake in them, or --help, need not wait for what is slow to import."""
    settings = read_settings(RouterSettings, PROGRAM, sys.argv[1:], "STAGECOACH_ROUTER_")
    configure_logging(settings.log_level)
    from stagecoach import lifecycle
    from stagecoach_router.server import serve

    sys.exit(lifecycle.run(PROGRAM, lambda stop: serve(settings, stop)))


if __name__ == "__main__":
    main()

"""Logs: one line an event, on stderr."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str) -> None:
    """`level` is a name of the logging module, in any case."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )

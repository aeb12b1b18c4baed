"""Logs: one line an event, on stderr."""

from __future__ import annotations

import logging

from stagecoach.process.relayed_log import RelayHandler
from stagecoach.process.standard_streams import own_standard_error


def configure_logging(level: str) -> None:
    """`level` is a name of the logging module, in any case."""
    logging.basicConfig(
        level=level.upper(),
        handlers=[RelayHandler(own_standard_error())],
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )

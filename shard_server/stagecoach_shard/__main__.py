"""The `stagecoach-shard` command: reads its settings, then serves until it is told to stop."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

PROGRAM = "stagecoach-shard"


def main() -> None:
    """Reads the settings before torch is imported, so that --help or a mistake in them is answered at once."""
    with _the_extra():
        from stagecoach.process.logs import configure_logging
        from stagecoach.process.settings import read_settings
        from stagecoach.process.standard_streams import open_closed_streams
        from stagecoach_shard.settings import ShardSettings
    open_closed_streams()
    settings = read_settings(ShardSettings, PROGRAM, sys.argv[1:], "STAGECOACH_SHARD_")
    configure_logging(settings.log_level)
    with _the_extra():
        import torch

        from stagecoach.process import lifecycle
        from stagecoach_shard.server import serve
    torch.set_num_threads(settings.threads)
    # A file that is cut short while it is read, or a bug in a kernel, ends the process by a signal: this says where.
    faulthandler.enable()
    end(lifecycle.run(PROGRAM, lambda stop: serve(settings, stop)))


def end(status: int) -> NoReturn:
    """Ends the process with `status`.

    In the middle of a step, as when a second signal has said not to wait for it, the interpreter's own end would take
    away what the compute thread still uses, and turn into a crash.
    """
    from stagecoach_shard.runtime.stage_runner import is_computing

    if is_computing():
        logging.shutdown()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def _the_extra() -> Iterator[None]:
    """Ends the process with a hint where a package is missing: the bare install has this command, too."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f"{PROGRAM}: error: {error.name} is missing: install Stagecoach with its [shard] extra")


if __name__ == "__main__":
    main()

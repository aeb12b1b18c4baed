"""The `stagecoach-shard` command: reads its settings, then serves until it is told to stop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

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
    sys.exit(lifecycle.run(PROGRAM, lambda stop: serve(settings, stop)))


@contextlib.contextmanager
def _the_extra() -> Iterator[None]:
    """Ends the process with a hint where a package is missing: the bare install has this command, too."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f"{PROGRAM}: error: {error.name} is missing: install Stagecoach with its [shard] extra")


if __name__ == "__main__":
    main()

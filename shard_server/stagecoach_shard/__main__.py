"""`stagecoach-shard`."""

from __future__ import annotations

import sys

from stagecoach.config import read_settings
from stagecoach.telemetry import configure_logging
from stagecoach_shard.settings import ShardSettings

PROGRAM = "stagecoach-shard"


def main() -> None:
    """Reads the settings first: a mistake in them, or --help, need not wait for what is slow to import."""
    settings = read_settings(ShardSettings, PROGRAM, sys.argv[1:], "STAGECOACH_SHARD_")
    configure_logging(settings.log_level)
    import torch

    from stagecoach import lifecycle
    from stagecoach_shard.server import serve

    torch.set_num_threads(settings.threads)
    sys.exit(lifecycle.run(PROGRAM, lambda stop: serve(settings, stop)))


if __name__ == "__main__":
    main()

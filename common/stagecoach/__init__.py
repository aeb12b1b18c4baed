"""What every Stagecoach process must agree on: the contract, framing, errors, sampling parameters. No torch here."""

__version__ = "0.1.0"

# Raised whenever an older router or shard could misread what a newer one sends. Checked when a session opens.
PROTOCOL_VERSION = 4

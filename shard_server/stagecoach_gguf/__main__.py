"""The program behind `stagecoach import`: `python -m stagecoach_gguf SOURCE TARGET` runs one import."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from stagecoach.errors import StagecoachError
from stagecoach.process.standard_streams import open_closed_streams
from stagecoach_gguf.importer import import_gguf


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one import and returns the exit status. Why an import failed is written to standard error."""
    open_closed_streams()
    parser = argparse.ArgumentParser(
        prog="stagecoach import",
        description="Turn a GGUF file into a checkpoint folder (safetensors in bfloat16, config, tokenizer).",
    )
    parser.add_argument("source", help="a .gguf file, or the name of an installed Python package that holds one")
    parser.add_argument("target", type=Path, help="the folder to make; must not exist, or be empty")
    options = parser.parse_args(arguments)
    # So that a polite kill, and a terminal that is closed, also take the half-written folder away.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _exit)
    try:
        import_gguf(options.source, options.target)
    except StagecoachError as error:
        sys.stderr.write(f"import failed: {error.message}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("import interrupted; nothing was left behind\n")
        return 130
    sys.stderr.write(f"{options.target} is ready\n")
    return 0


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

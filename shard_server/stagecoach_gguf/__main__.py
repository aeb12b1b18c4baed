"""The program behind `stagecoach import`: `python -m stagecoach_gguf SOURCE TARGET` runs one import."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from stagecoach.errors import StagecoachError
from stagecoach.process.standard_streams import open_closed_streams
from stagecoach_gguf.importer import import_gguf

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
    for number in _STOP_SIGNALS:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # ignored: as under nohup
            signal.signal(number, _exit)
    try:
        import_gguf(options.source, options.target)
    except StagecoachError as error:
        _say(f"import failed: {error.message}")
        return 1
    except SystemExit as ended:
        _say("import interrupted; nothing was left behind")
        raise ended
    _say(f"{options.target} is ready")
    return 0


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it, or there is no room for it: the status says it, too
        sys.stderr.write(f"{line}\n")


def _exit(number: int, frame: FrameType | None) -> None:
    for each in _STOP_SIGNALS:  # tidying up is not interrupted by a second one: a ctrl-C may come by two ways
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

"""Two shards of one thread each against transformers' `generate` in one process with two threads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.comparison import argument_parser, compare
from benchmarks.peer_process import SCRIPTS, PeerProcess


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="of an environment with transformers (default: ours)"
    )
    parser.add_argument(
        "--threads", type=int, choices=range(1, 65), default=2, metavar="N", help="of transformers (default 2)"
    )
    arguments = report.parse(parser, argv)
    python = report.check_program(arguments.python, "python", "a Python interpreter")
    command = [str(python), str(SCRIPTS / "serve_transformers.py"), str(arguments.model), str(arguments.threads)]
    compare(arguments, "against_transformers", {"transformers": PeerProcess("transformers", command)})


if __name__ == "__main__":
    report.run(main)

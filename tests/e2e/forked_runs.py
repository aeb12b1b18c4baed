"""`python -m tests.e2e.forked_runs`: runs a server's command many times, and imports what it needs once.

Importing torch takes seconds, and a command that refuses its arguments does nothing else. So this process imports the
server, and each run is a fork of it with arguments of its own. JSON in on stdin: the package, the command's name, and
the arguments of each run. JSON out on stdout: the exit status of each, and what it wrote to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], None], argv: list[str]) -> tuple[int, str]:
    """The exit status and stderr of `main` with these arguments, in a process of its own."""
    with tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if pid == 0:
            os.dup2(stderr.fileno(), 2)
            _run_and_exit(main, argv)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        stderr.seek(0)
        return status, stderr.read().decode()


def _run_and_exit(main: Callable[[], None], argv: list[str]) -> NoReturn:
    status = 1
    try:
        sys.argv = argv
        main()
        status = 0
    except SystemExit as ended:  # as the interpreter treats it
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
        else:
            status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    package, program, argument_lists = json.load(sys.stdin)
    importlib.import_module(f"{package}.server")
    command = importlib.import_module(f"{package}.__main__").main
    json.dump([run(command, [program, *arguments]) for arguments in argument_lists], sys.stdout)


if __name__ == "__main__":
    main()

"""Starts our commands as a user would, reads what they say, and leaves nothing running."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MODULES = {
    "stagecoach-shard": "stagecoach_shard",
    "stagecoach-router": "stagecoach_router",
    "stagecoach": "stagecoach_cli",
}
TIMEOUT_S = 60.0


def command(program: str, *arguments: str) -> list[str]:
    if program == "stagecoach":
        return [sys.executable, "-c", "from stagecoach_cli import main; main()", *arguments]
    return [sys.executable, "-m", MODULES[program], *arguments]


def shard_arguments(model: Path, layers: str, port: int | str, /, **flags: object) -> list[str]:
    """Of a shard of little memory, in float32, unless `flags` say otherwise."""
    facts: dict[str, object] = {"model": model, "layers": layers, "listen": f"127.0.0.1:{port}"}
    facts |= {"dtype": "float32", "kv-cache-memory": "4M"}
    facts |= {name.replace("_", "-"): value for name, value in flags.items()}
    return [part for name, value in facts.items() for part in (f"--{name}", str(value))]


def run(program: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Runs to the end."""
    return subprocess.run(
        command(program, *arguments), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )


def run_each(program: str, argument_lists: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Runs a server's command to its end with each of these arguments; quicker than `run` for each."""
    asked = json.dumps([MODULES[program], program, argument_lists])
    command = [sys.executable, "-m", "tests.e2e.forked_runs"]
    done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
    return [
        subprocess.CompletedProcess([program, *arguments], status, stderr=stderr)
        for arguments, (status, stderr) in zip(argument_lists, json.loads(done.stdout), strict=True)
    ]


class Process:
    """One that stays; its output is collected."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )
        self.pid = self._process.pid
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str) -> str:
        """The first line that holds `text`."""

        def found() -> str | None:
            return next((line for line in self.lines if text in line), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, TIMEOUT_S)
            line = found()
        assert line is not None, f"{text!r} was not printed:\n" + "".join(self.lines)
        return line

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self._process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return status

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(TIMEOUT_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@contextmanager
def running(program: str, *arguments: str) -> Iterator[Process]:
    process = Process(command(program, *arguments))
    try:
        yield process
    finally:
        process.kill()

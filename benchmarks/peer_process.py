"""Another engine in a process of its own, of its own Python environment, that waits for its turn.

The process runs a script of benchmarks/peers: it says READY once it has loaded its model, then answers each line
"<concurrency> <prompt tokens> <output tokens>" with "RESULT <prefill seconds> <whole seconds>". Whatever else it prints
is shown only when it fails.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.comparison import OUTPUT_TOKENS, PROMPT_TOKENS, Figures
from stagecoach.errors import DeadlineExceeded, Unavailable

SCRIPTS = Path(__file__).parent / "peers"
START_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 600.0
NUM_LAST_LINES = 20


class PeerProcess:
    """`command` is run with `environment` on top of ours, less what would lead to our own packages."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._name = name
        self._command = command
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self._environment = {**inherited, **(environment or {})}
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)

    def run(self, concurrency: int) -> Figures:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{concurrency} {PROMPT_TOKENS} {OUTPUT_TOKENS}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        _, prefill_s, whole_s = self._next_answer("RESULT", RUN_TIMEOUT_S).split()
        return Figures(
            prefill_tokens_per_s=concurrency * PROMPT_TOKENS / float(prefill_s),
            e2e_tokens_per_s=concurrency * OUTPUT_TOKENS / float(whole_s),
        )

    def __enter__(self) -> Self:
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise Unavailable(f"{self._name}: cannot run {self._command[0]}: {error.strerror}") from error
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._next_answer("READY", START_TIMEOUT_S)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        """Its standard input ends, which is how it is told; an engine may have processes of its own to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _next_answer(self, word: str, timeout_s: float) -> str:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise DeadlineExceeded(f"{self._name}: no {word} in {timeout_s:g} s") from None
        if line is None or not line.startswith(word):
            raise self._ended()
        return line

    def _ended(self) -> Unavailable:
        output = "\n".join(self._last_lines)
        return Unavailable(f"{self._name} ended; its last output:\n{output}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("READY", "RESULT ")):
                self._answers.put(line.rstrip())
            else:
                self._last_lines.append(line.rstrip())
        self._answers.put(None)

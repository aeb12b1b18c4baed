"""Two shards of one thread each against llama.cpp: in one process with two threads, and over two of its RPC servers.

`--build` is the folder it was built in (with GGML_RPC), `--gguf` the same weights in its own format, in bfloat16.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks import report
from benchmarks.comparison import OUTPUT_TOKENS, PROMPT_TOKENS, Figures, argument_parser, compare
from stagecoach.errors import ConfigError, DeadlineExceeded, StagecoachError, Unavailable

THREADS = 2
CONTEXT_TOKENS = 8192  # of all sequences together
NUM_RPC_SERVERS = 2
RUN_TIMEOUT_S = 600.0
START_TIMEOUT_S = 30.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--build", type=Path, help="llama.cpp's build folder; its programs are in bin/")
    parser.add_argument("--gguf", type=Path, help="the model in bfloat16")
    arguments = report.parse(parser, argv)
    for name in ("build", "gguf"):
        if getattr(arguments, name) is None:
            raise ConfigError(f"{name}: is needed, see --help", field=name)
    bench = report.check_program(arguments.build / "bin" / "llama-batched-bench", "build", "there: build llama.cpp")
    server = report.check_program(arguments.build / "bin" / "ggml-rpc-server", "build", "there: build with GGML_RPC=ON")
    gguf = report.check_program(arguments.gguf, "gguf", "a file")
    peers = {"llama.cpp": LlamaCpp(bench, gguf), "llama.cpp RPC": LlamaCppRpc(bench, gguf, server)}
    compare(arguments, "against_llamacpp", peers)


class LlamaCpp:
    """One process with two threads, started for each run; loading the model is not counted."""

    def __init__(self, bench: Path, gguf: Path) -> None:
        self._bench = bench
        self._gguf = gguf

    def run(self, concurrency: int) -> Figures:
        command = [str(self._bench), "-m", str(self._gguf), "-c", str(CONTEXT_TOKENS), *self._where()]
        command += ["-npp", str(PROMPT_TOKENS), "-ntg", str(OUTPUT_TOKENS), "-npl", str(concurrency)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"llama.cpp: a run took more than {RUN_TIMEOUT_S:g} s") from None
        if result.returncode != 0:
            raise Unavailable(f"llama.cpp ended with status {result.returncode}:\n{result.stderr[-2000:]}")
        return read_table(result.stdout)

    def _where(self) -> list[str]:
        return ["-t", str(THREADS)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LlamaCppRpc(LlamaCpp):
    """Layers split over two RPC servers of one thread each."""

    def __init__(self, bench: Path, gguf: Path, server: Path) -> None:
        super().__init__(bench, gguf)
        self._server = server
        self._ports: list[int] = []
        self._servers: list[subprocess.Popen[bytes]] = []

    def _where(self) -> list[str]:
        return ["-ngl", "99", "--rpc", ",".join(f"127.0.0.1:{port}" for port in self._ports)]

    def __enter__(self) -> Self:
        try:
            for _ in range(NUM_RPC_SERVERS):
                port = _free_port()
                command = [str(self._server), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
                self._ports.append(port)
                self._servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            for port in self._ports:
                _wait_for(port)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for server in self._servers:
            server.kill()
            server.wait()


def read_table(text: str) -> Figures:
    """The last row of llama-batched-bench's table.

    Its columns: PP, TG, B, N_KV, T_PP s, S_PP t/s, T_TG s, S_TG t/s, T s, S t/s. Raises Unavailable where it is none.
    """
    for line in reversed(text.splitlines()):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        with contextlib.suppress(ValueError):
            numbers = [float(cell) for cell in cells]
            if len(numbers) == 10:
                _, new_tokens, batch, _, _, prefill_per_s, _, _, whole_s, _ = numbers
                return Figures(prefill_per_s, new_tokens * batch / whole_s)
    raise Unavailable("llama.cpp: llama-batched-bench printed no row of figures")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            report.check_server(f"127.0.0.1:{port}", "rpc")
            return
        except StagecoachError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    report.run(main)

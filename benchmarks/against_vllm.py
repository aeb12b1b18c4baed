"""Two shards of one thread each against vLLM on the CPU with two threads, in an environment of its own (--python)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.comparison import argument_parser, compare
from benchmarks.peer_process import SCRIPTS, PeerProcess
from stagecoach.errors import ConfigError

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: more than 32 sequences need
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--python", type=Path, help="of the environment that vLLM is installed in")
    arguments = report.parse(parser, argv)
    if arguments.python is None:
        raise ConfigError("python: name the Python of the environment that vLLM is installed in", field="python")
    python = report.check_program(arguments.python, "python", "a Python interpreter")
    command = [str(python), str(SCRIPTS / "serve_vllm.py"), str(arguments.model)]
    compare(arguments, "against_vllm", {"vllm": PeerProcess("vLLM", command, ENVIRONMENT)})


if __name__ == "__main__":
    report.run(main)

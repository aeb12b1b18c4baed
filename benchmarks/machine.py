"""What a figure was read on: without it a figure means nothing to anybody else."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Of all a CPU can do, what decides how fast a layer is: vector width, half precision, dot products, matrix tiles.
RELEVANT_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "fphp", "bf16", "i8mm", "sve", "sve2"),
)
PACKAGES = ("stagecoach", "grpcio", "protobuf", "uvloop", "numpy", "torch", "transformers")


def machine_facts() -> dict[str, object]:
    """The CPU, its memory, the kernel, the versions that matter, the commit, and the time (UTC, ISO 8601)."""
    model, flags = parse_cpu_info(_read("/proc/cpuinfo"))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": num_cores(),
        "isa_flags": flags,
        "memory_bytes": parse_memory_bytes(_read("/proc/meminfo")),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": git_commit(),
    }


def num_cores() -> int:
    """The cores that this process may use, which in a container are often not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_cpu_info(text: str) -> tuple[str, list[str]]:
    """The CPU's name and its relevant flags, from the text of /proc/cpuinfo; of its first core."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", ""), [flag for flag in RELEVANT_FLAGS if flag in present]


def parse_memory_bytes(text: str) -> int | None:
    """All of the machine's memory, from the text of /proc/meminfo; None where it does not say."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    return None


def git_commit() -> str | None:
    """The commit this tree is at, with "+changes" where the tree differs from it; None outside a repository."""
    commit = _git(["rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    return commit + ("+changes" if _git(["status", "--porcelain", "--untracked-files=no"]) else "")


def _git(arguments: Sequence[str]) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

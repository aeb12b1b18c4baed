"""How much memory there is, and how many K/V blocks a shard can hold in it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

from stagecoach.errors import ConfigError
from stagecoach.process.settings import parse_size


def give_back_unused() -> None:
    """Returns memory that was freed to the system, and to the device, which would otherwise be kept for later.

    Loading leaves much of it: each weight is freed once a packed copy is made, between copies that stay.
    """
    torch.cuda.empty_cache()  # nothing, where no device is in use
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def free_bytes(device: torch.device) -> int:
    """How much memory of the device is free now; of a CPU, how much this process may have without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    left = free_in_cgroups()
    return available if left is None else min(available, left)


def free_in_cgroups(memberships: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How much the limits of this process's control groups leave; None where there are none (or only of version 1).

    A container has a part of its machine's memory, and whoever takes more is killed, while the machine has plenty left.
    """
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return None
    own = next((root / line.removeprefix("0::/") for line in lines if line.startswith("0::/")), root)
    folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    left = [free for folder in folders if (free := _free_in_cgroup(folder)) is not None]
    return min(left, default=None)


def _free_in_cgroup(folder: Path) -> int | None:
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        # Files that were read and may be forgotten count as used, such as those of a checkpoint.
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(entries.get("inactive_file", 0)))
    except (OSError, ValueError):  # the root has no such files; without a limit it is the word "max"
        return None


def num_kv_blocks(budget: str | None, fraction: float, *, bytes_per_block: int, free: int) -> int:
    """Blocks that fit into `budget` (a size), or, where that is None, into `fraction` of the `free` bytes.

    Raises ConfigError for more than is free and for less than one block, InvalidArgument for a budget that is no size.
    """
    field = "kv-cache-fraction" if budget is None else "kv-cache-memory"
    num_bytes = int(free * fraction) if budget is None else parse_size(budget, field)
    if num_bytes > free:
        raise ConfigError(f"{field}: {num_bytes} bytes wanted, {free} free", field=field, limit=free, value=num_bytes)
    if num_bytes < bytes_per_block:
        raise ConfigError(
            f"{field}: one block takes {bytes_per_block} bytes, got {num_bytes}",
            field=field,
            limit=bytes_per_block,
            value=num_bytes,
        )
    return num_bytes // bytes_per_block

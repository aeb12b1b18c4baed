"""Memory and file descriptors of the processes that are watched, and how much more of them they may have at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tests.soak.supervised import Supervised

# Both figures are read while nobody calls. An allocator does not give back all that it had at its peak, and where the
# peak of the second half was above the one of the first, that stays.
MAX_GROWTH_BYTES = 24 << 20
# What a router may remember of finished requests for those who come back: 131,072 tokens of some 300 bytes, for a
# minute. A router that is younger when it is first looked at may still grow by that.
MAX_REMEMBERED_BYTES = 40 << 20
REMEMBERS_FOR_S = 60.0
# A connection that is being made or unmade, and what gRPC opens with it.
MAX_MORE_DESCRIPTORS = 8


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one process at one time."""

    name: str
    pid: int
    memory_bytes: int  # resident
    num_descriptors: int

    def __str__(self) -> str:
        return f"{self.name} {self.memory_bytes / 2**20:.0f} MiB {self.num_descriptors} fds"


def read_resources(process: Supervised) -> Resources:
    """From /proc."""
    with open(f"/proc/{process.pid}/statm", encoding="ascii") as statm:
        num_pages = int(statm.read().split()[1])
    num_descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
    return Resources(process.name, process.pid, num_pages * os.sysconf("SC_PAGE_SIZE"), num_descriptors)


def growth(before: Sequence[Resources], after: Sequence[Resources], *, max_bytes: int) -> list[str]:
    """What has grown by more than it may. Both are of the same processes, which have not ended in between."""
    found = []
    for one, other in zip(before, after, strict=True):
        assert one.pid == other.pid, "a process that is watched is not killed"
        if other.memory_bytes - one.memory_bytes > max_bytes:
            found.append(f"{one} before, {other} at the end: more than {max_bytes >> 20} MiB more")
        if other.num_descriptors - one.num_descriptors > MAX_MORE_DESCRIPTORS:
            found.append(f"{one} before, {other} at the end: more than {MAX_MORE_DESCRIPTORS} descriptors more")
    return found

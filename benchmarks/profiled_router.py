"""The ordinary router under the standard library's profiler, for `router_scaling`.

SIGUSR1 has it write, to the file that the first argument names, the processor time of the process and the seconds that
each part of the router took since the start. A part is a set of the router's files, and takes what its functions take
without those they call in other parts; what they call outside of the router counts as theirs. Coroutines are not
counted: what they wait in is gRPC's C code, which the profiler cannot tell from them. Nothing is replaced or wrapped.

The profiler looks at the clock on the wall, so the router needs a core for itself: the second argument is its number,
and the benchmark keeps its other processes away from it. A call costs some 0.2 us more, so speed is measured without.
"""

from __future__ import annotations

import cProfile
import inspect
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import CodeType
from typing import Any

import stagecoach_router
from stagecoach_router import __main__ as command

ROUTER_FOLDER = Path(stagecoach_router.__file__).parent
# A folder or file of the router, and what it does for a token; the longest one that fits counts. What is in none of
# them goes under the name of its folder, so that a new folder shows by itself.
PARTS = {
    "scheduling": "schedule",
    "engine": "engine",
    "engine/wire.py": "write and read frames",
    "pipelines": "write and read frames",
    "sampling": "sample",
    "text": "detokenize",
    "requests": "detokenize",
    "frontend": "serialise",
}
_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def part_of(code: CodeType | str) -> str | None:
    """The part that a function belongs to, which the profiler names by its code, or by a text if it is built in.

    None for a coroutine, and for what is not the router's.
    """
    if isinstance(code, str) or code.co_flags & _COROUTINE:
        return None
    path = Path(code.co_filename)
    if not path.is_relative_to(ROUTER_FOLDER):
        return None
    relative = path.relative_to(ROUTER_FOLDER)
    for place in (relative, *relative.parents):
        if place.as_posix() in PARTS:
            return PARTS[place.as_posix()]
    return relative.parts[0]


def seconds_by_part(entries: Iterable[Any]) -> Counter[str]:
    """Sums up what `cProfile.Profile.getstats()` gives."""
    seconds: Counter[str] = Counter()
    for entry in entries:
        if (part := part_of(entry.code)) is not None:
            helpers = (each for each in entry.calls or () if not _is_routers(each.code))
            seconds[part] += entry.inlinetime + sum(each.totaltime for each in helpers)
    return seconds


def _is_routers(code: CodeType | str) -> bool:
    return isinstance(code, CodeType) and Path(code.co_filename).is_relative_to(ROUTER_FOLDER)


def main() -> None:
    """`profiled_router FILE CORE ...`: the other arguments are the router's."""
    path, core = sys.argv.pop(1), int(sys.argv.pop(1))
    profile = cProfile.Profile(builtins=False)

    def report(*_: object) -> None:
        facts = {"cpu_s": time.process_time(), "parts_s": seconds_by_part(profile.getstats())}
        Path(f"{path}.part").write_text(json.dumps(facts), encoding="utf-8")
        os.replace(f"{path}.part", path)

    signal.signal(signal.SIGUSR1, report)
    os.sched_setaffinity(0, [core])
    profile.enable()
    command.main()


if __name__ == "__main__":
    main()

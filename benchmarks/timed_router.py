"""The router with a clock around its parts, for `router_scaling`: the ordinary command, whose functions are wrapped.

SIGUSR1 has it write, to the file that the first argument names, the seconds each part took since the start; the time
of a part within another counts for the inner one only. The wrapping itself costs some 0.3 us a call, so speed is
measured without it.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from stagecoach_router import __main__ as command

# (what holds the function, its name, the part it belongs to)
from stagecoach_router.engine import engine

# (what holds the function, its name, the part it belongs to)
from stagecoach_router.frontend import grpc_service

# (what holds the function, its name, the part it belongs to)
from stagecoach_router.pipelines import pipeline
from stagecoach_router.requests import completion

# (what holds the function, its name, the part it belongs to)
from stagecoach_router.scheduling import scheduler

# (what holds the function, its name, the part it belongs to)
PARTS: tuple[tuple[Any, str, str], ...] = (
    (scheduler.Scheduler, "schedule", "schedule"),
    (scheduler.Scheduler, "complete", "schedule"),
    (scheduler.Scheduler, "append_token", "schedule"),
    (engine, "write_micro_batch", "write frame"),
    (pipeline, "read_frame", "read result"),
    (engine, "read_outputs", "read result"),
    (engine, "choose_tokens", "sample"),
    (completion.Completion, "advance", "detokenize"),
    (grpc_service, "write_deltas", "serialise"),
    (engine.Engine, "_on_result", "engine"),
)


class Clock:
    """Seconds by part, each without those within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # of the calls that are open, the time of the parts within them

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        self.seconds.setdefault(part, 0.0)
        seconds, inner, now = self.seconds, self._inner, time.thread_time

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            inner.append(0.0)
            begin = now()
            try:
                return function(*arguments, **named)
            finally:
                took = now() - begin
                seconds[part] += took - inner.pop()
                inner[-1] += took

        return timed


def main() -> None:
    path = sys.argv.pop(1)
    clock = Clock()
    for holder, name, part in PARTS:
        setattr(holder, name, clock.around(getattr(holder, name), part))

    def report(*_: object) -> None:
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump({"cpu_s": time.process_time(), "parts_s": clock.seconds}, file)
        os.replace(f"{path}.part", path)

    signal.signal(signal.SIGUSR1, report)
    command.main()


if __name__ == "__main__":
    main()

"""Keeps processes running: one that ends by itself is started again, with the same command and address."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from stagecoach.errors import ConfigError, StagecoachError
from stagecoach.topology import LayerRange
from stagecoach_client.status import ClusterStatus
from stagecoach_local.child_process import ChildProcess, Ended, describe_exit
from stagecoach_local.restarts import GiveUp, Restarts, StartAgain

Role = Literal["shard", "spare", "router"]

_POLL_INTERVAL_S = 0.1
# Between two looks at the cluster, which are only taken while a process that was started again has not come up.
_LOOK_INTERVAL_S = 1.0


class Process:
    """One of a cluster's processes: what it is started with, and the child that runs or ran last."""

    def __init__(
        self,
        name: str,
        role: Role,
        command: Sequence[str],
        address: str,
        layers: LayerRange | None = None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self.name = name
        self.role = role
        self.address = address
        self.layers = layers
        self._command = command
        self._on_line = on_line
        self.child = ChildProcess(name, command, on_line)
        self.restarts = Restarts()
        self.came_up = False
        self.started_at = 0.0  # by the supervisor's clock
        self.again_at: float | None = None  # it has ended, and is started again then
        self.given_up = False  # it has ended, and stays so

    def start_again(self, now: float) -> None:
        """Raises ConfigError where it cannot be started."""
        child = ChildProcess(self.name, self._command, self._on_line)
        child.start()
        self.child = child
        self.came_up = False
        self.started_at = now
        self.again_at = None

    def is_in(self, status: ClusterStatus) -> bool:
        """Whether the cluster knows this very process as one that does its job."""
        if self.role == "router":
            return status.ready
        if any(self.child.pid == stage.pid for pipeline in status.pipelines for stage in pipeline.stages):
            return True
        return any(self.address == spare.address and not spare.reason for spare in status.spares)


class Supervisor:
    """Watches `processes`, which all have come up, from a thread of its own.

    `look` asks the router how the cluster is; None: it does not answer. `on_event` is told, in one line, of each
    process that ended, from that thread. One that cannot be kept running is left alone where the others can serve
    without it; else it is in `failure`, and nothing is watched any more.
    """

    def __init__(
        self,
        processes: Sequence[Process],
        look: Callable[[], ClusterStatus | None],
        on_event: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processes = processes
        self._look = look
        self._on_event = on_event
        self._clock = clock
        self._next_look_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begins to watch."""
        for process in self._processes:
            process.came_up = True
            process.started_at = self._clock()
        self._thread.start()

    def stop(self) -> None:
        """Once this has returned, it starts nothing any more. Again is harmless."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(_POLL_INTERVAL_S) and self.failure is None:
                self._turn()
        except Exception as error:  # whoever waits for the cluster has to hear of it
            self.failure = error

    def _turn(self) -> None:
        self._note_who_came_up()
        for process in self._processes:
            if self._stopping.is_set():
                return
            now = self._clock()
            if process.given_up:
                continue
            if process.again_at is not None:
                if now >= process.again_at:
                    self._start_again(process, process.name, now)
            elif (ended := process.child.ended()) is not None:
                self._take_end(process, ended, now)

    def _take_end(self, process: Process, ended: Ended, now: float) -> None:
        decision = process.restarts.after(ended, lived_s=now - process.started_at, came_up=process.came_up)
        how = f"{process.name} (pid {ended.pid}) {describe_exit(ended.status)}"
        if isinstance(decision, StartAgain) and not decision.delay_s:
            self._start_again(process, f"{how};", now)
        else:
            self._wait_or_give_up(process, decision, how, ended.died, now)

    def _start_again(self, process: Process, who: str, now: float) -> None:
        try:
            process.start_again(now)
        except ConfigError as error:
            text = error.message
            decision = process.restarts.after_no_start()
            self._wait_or_give_up(process, decision, text, lambda why: ConfigError(f"{text}, {why}"), now)
        else:
            self._say(f"{who} started again, pid {process.child.pid}")

    def _wait_or_give_up(
        self,
        process: Process,
        decision: StartAgain | GiveUp,
        how: str,
        failure: Callable[[str], StagecoachError],
        now: float,
    ) -> None:
        if isinstance(decision, StartAgain):
            process.again_at = now + decision.delay_s
            self._say(f"{how}; to be started again in {decision.delay_s:g} s")
            return
        process.given_up = True
        if can_serve(self._processes):
            self._say(f"{how}, {decision.why}; the others serve on without it")
        else:
            self.failure = failure(decision.why)

    def _note_who_came_up(self) -> None:
        waiting = [each for each in self._processes if not (each.came_up or each.given_up or each.again_at is not None)]
        if not waiting or self._clock() < self._next_look_at:
            return
        self._next_look_at = self._clock() + _LOOK_INTERVAL_S
        status = self._look()
        for process in waiting:
            process.came_up = status is not None and process.is_in(status)

    def _say(self, text: str) -> None:
        if self._on_event is not None:
            self._on_event(text)


def can_serve(processes: Sequence[Process]) -> bool:
    """Whether those that were not given up suffice: a router, and for each layer range a shard, or a spare instead."""
    left = [process for process in processes if not process.given_up]
    lacking = {each.layers for each in processes if each.role == "shard"} - {each.layers for each in left}
    return any(each.role == "router" for each in left) and len(lacking) <= sum(each.role == "spare" for each in left)

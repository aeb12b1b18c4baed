"""Keeps processes running: one that ends by itself is started again, with the same command and address."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from stagecoach.errors import ConfigError, StagecoachError
from stagecoach_client.status import ClusterStatus
from stagecoach_local.process import Process, can_serve
from stagecoach_local.process_exit import Ended, describe_exit
from stagecoach_local.restarts import GiveUp, StartAgain

_POLL_INTERVAL_S = 0.1
# Between two looks at the cluster. They are taken only while a process that was started again has not come up; often,
# since one that is killed before it was seen to have come up counts as one that failed to.
_LOOK_INTERVAL_S = 0.25
# At the end, for a look that is being taken: gRPC would complain of a router that stops in its midst.
_LAST_LOOK_TIMEOUT_S = 1.0


class Supervisor:
    """Watches `processes`, which all have come up, from a thread of its own.

    `look` asks the router how the cluster is, and returns None if it does not answer. `on_event` is told in one line of
    each process that ended; it is called from the supervisor's thread.

    What to do about each death is decided in restarts.py. A process that is given up is left alone if the others can
    serve without it. If they cannot, the reason is in `failure`, and nothing is watched any more.
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
        self._wants_look = threading.Event()
        self._seen: tuple[float, ClusterStatus | None] = (0.0, None)  # when the latest look began, and what it showed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        # Of its own: a router that does not answer keeps whoever looks waiting, and no process may wait for that.
        self._looker = threading.Thread(target=self._look_when_wanted, name="supervisor's look", daemon=True)
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begins to watch."""
        for process in self._processes:
            process.came_up = True
            process.started_at = self._clock()
        self._thread.start()
        self._looker.start()

    def stop(self) -> None:
        """Ends the watch. Nothing is started or looked at any more once this has returned. It may be called again."""
        self._stopping.set()
        self._wants_look.set()
        self._thread.join()
        self._looker.join(_LAST_LOOK_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._stopping.wait(_POLL_INTERVAL_S) and self.failure is None:
                self._watch_once()
        except Exception as error:  # whoever waits for the cluster has to hear of it
            self.failure = error

    def _watch_once(self) -> None:
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
                self._on_end(process, ended, now)

    def _on_end(self, process: Process, ended: Ended, now: float) -> None:
        decision = process.restarts.after(ended, lived_s=now - process.started_at, came_up=process.came_up)
        how = f"{process.name} (pid {ended.pid}) {describe_exit(ended.status)}"
        if isinstance(decision, StartAgain) and not decision.delay_s:
            self._start_again(process, f"{how};", now)
        else:
            self._wait_or_give_up(process, decision, how, ended.died, now)

    def _start_again(self, process: Process, subject: str, now: float) -> None:
        """Starts the process; `subject` begins the sentence that says so."""
        try:
            process.start_again(now)
        except ConfigError as error:
            text = error.message
            decision = process.restarts.after_no_start()
            self._wait_or_give_up(process, decision, text, lambda why: ConfigError(f"{text}, {why}"), now)
        else:
            self._say(f"{subject} started again, pid {process.child.pid}")

    def _wait_or_give_up(
        self,
        process: Process,
        decision: StartAgain | GiveUp,
        how: str,
        failure: Callable[[str], StagecoachError],
        now: float,
    ) -> None:
        """Acts on the decision. `how` says how the process ended; `failure(why)` is the error if all ends with it."""
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
        if not waiting:
            self._wants_look.clear()
            return
        self._wants_look.set()
        began_at, status = self._seen
        for process in waiting:
            # What was seen before it started is of the process before.
            process.came_up = status is not None and began_at >= process.started_at and process.does_its_job(status)

    def _look_when_wanted(self) -> None:
        try:
            while not self._stopping.is_set():
                self._wants_look.wait()
                if self._stopping.is_set():  # that is what has woken us
                    return
                began_at = self._clock()
                self._seen = (began_at, self._look())
                self._stopping.wait(_LOOK_INTERVAL_S)
        except Exception as error:
            self.failure = error

    def _say(self, text: str) -> None:
        if self._on_event is not None:
            self._on_event(text)

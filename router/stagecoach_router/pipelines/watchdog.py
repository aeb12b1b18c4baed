"""Whether a pipeline has to be given up: a stage that does not answer, or a step that does not get on. Pure.

Every stage is asked ten times in the timeout for a load report. Its event loop answers, on the session, so an answer
says that the process runs and that its link to the router works both ways. It says nothing of its compute thread, nor
of the links between stages; what becomes of the steps does. A stage that computes for long is no fault as long as it is
unknown how long that takes: a chunk of prefill on a slow machine may well take a minute. So a step is overdue

- when no stage computes, and it does not come back either: it was lost on its way;
- when it takes many times as long as its like did, and the timeout besides;
- where its like was never measured, after the step timeout.

All that a stage finishes meanwhile begins these times anew.

Other routers may use the same stages. So only what a stage does for our lease counts as getting on; and while a step of
ours waits at a stage that computes theirs, which is first in, first out, no time counts, unless the stage is stuck in a
single one of them for the step timeout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from stagecoach.rpc.watch_clock import LOOKS_PER_TIMEOUT, WatchClock
from stagecoach_router.metrics.load_report import LoadReport

# Of the timeout: up to two looks pass between the fault and the first sign of it.
PATIENCE = 0.8
# So many times what a step is expected to take, beyond the patience with any step.
MAX_SLOWDOWN = 8.0


@dataclass(frozen=True, slots=True)
class FaultLimits:
    """How long things may take until a pipeline is given up.

    fault_timeout_s: within it, a stage that hangs or is cut off is found. step_timeout_s: so long a stage may compute
    one step of a size that was never measured.
    """

    fault_timeout_s: float = 5.0
    step_timeout_s: float = 120.0


DEFAULT_LIMITS = FaultLimits()


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a pipeline has to be given up, and the stage whose fault it is, where that is known."""

    reason: str
    address: str | None = None


@dataclass(slots=True)
class _Watched:
    """What a stage was asked and has not answered yet, as (number, when), and what it said last."""

    questions: deque[tuple[int, float]] = field(default_factory=deque)
    latest: LoadReport | None = None
    not_stuck_s: float = 0.0  # when it was last known to have finished somebody's step, or to have none to compute


class Watchdog:
    """Watches the stages at `addresses` and the steps through them. All times are those that `look` was told."""

    def __init__(self, addresses: Sequence[str], limits: FaultLimits) -> None:
        self.interval_s = limits.fault_timeout_s / LOOKS_PER_TIMEOUT
        self._patience_s = PATIENCE * limits.fault_timeout_s
        self._step_timeout_s = limits.step_timeout_s
        self._clock = WatchClock(self.interval_s)
        self._stages = {address: _Watched() for address in addresses}
        self._in_flight: deque[float | None] = deque()  # seconds that each step is expected to take
        self._oldest_since_s = 0.0  # when the step that is now the oldest became it
        # When a stage was last known to compute a step of ours, and to finish one. Waiting for others' counts as both.
        self._worked_s = 0.0
        self._finished_s = 0.0

    def sent(self, expected_s: float | None) -> None:
        """A step leaves; `expected_s` is what its whole way takes, None where that is unknown."""
        if not self._in_flight:
            self._oldest_since_s = self._clock.now_s
        self._in_flight.append(expected_s)

    def returned(self) -> None:
        """The oldest step is back."""
        if self._in_flight:
            self._in_flight.popleft()
        self._oldest_since_s = self._clock.now_s

    def answered(self, address: str, report: LoadReport) -> None:
        """A load report came, asked for or not."""
        stage = self._stages[address]
        while stage.questions and stage.questions[0][0] <= report.number:
            stage.questions.popleft()
        before, stage.latest = stage.latest, report
        if before is None:
            return
        now_s = self._clock.now_s
        computed = report.counters.compute_s > before.counters.compute_s
        computed_ours = report.lease_compute_s > before.lease_compute_s
        if report.counters.num_steps > before.counters.num_steps or not computed:
            stage.not_stuck_s = now_s
        if computed_ours:
            self._worked_s = now_s
        if report.lease_num_steps > before.lease_num_steps:
            self._finished_s = now_s
        is_stuck = now_s - stage.not_stuck_s >= self._step_timeout_s
        if report.lease_queue_depth and computed and not computed_ours and not is_stuck:
            self._worked_s = self._finished_s = now_s  # ours waits behind another router's

    def look(self, monotonic_s: float, number: int) -> Finding | None:
        """What is wrong, if anything. If nothing is, question `number` has to go out to every stage now."""
        now_s = self._clock.look(monotonic_s)
        for address, stage in self._stages.items():
            if stage.questions and now_s - stage.questions[0][1] >= self._patience_s:
                return Finding(f"{address}: no answer for {now_s - stage.questions[0][1]:.1f} s", address)
        overdue = self._overdue(now_s) if self._in_flight else None
        if overdue is not None:
            return Finding(overdue)
        for stage in self._stages.values():
            stage.questions.append((number, now_s))
        return None

    def _overdue(self, now_s: float) -> str | None:
        expected_s = self._in_flight[0]
        idle_s = now_s - max(self._oldest_since_s, self._worked_s)
        stuck_s = now_s - max(self._oldest_since_s, self._finished_s)
        allowed_s = self._patience_s + MAX_SLOWDOWN * (expected_s or 0.0)
        if idle_s >= allowed_s:
            return f"a step is under way, and no stage has computed for {idle_s:.1f} s"
        if expected_s is None and stuck_s >= self._step_timeout_s:
            return f"a stage has computed a step for {stuck_s:.1f} s"
        if expected_s is not None and stuck_s >= allowed_s:
            return f"a step is expected to take {expected_s:.2g} s, and has not got on for {stuck_s:.1f} s"
        return None

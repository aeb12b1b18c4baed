"""Whether a stage has become many times slower than it was. Pure.

A stage says of every step how long it computed it. That is compared with what steps of that shape cost it some hundred
steps ago: not with what they cost lately, since that learns from the slow ones too. One slow step says nothing (another
process had the core, a cache was cold), so the sums over half the fault timeout are compared. Only steps that are all
decodes count, and none with more rows than had been measured by then, or many more positions: what they would cost is
a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stagecoach_router.scheduling.cost_model import MIN_SECONDS, StageCost, StepShape
from stagecoach_router.scheduling.pacing import Pacing, StageSeconds

# Of what a stage's steps used to take. Neighbours on the same cores make it a few times as much.
MAX_SLOWDOWN = 6.0
# Each step, beyond what it used to take. Steps of a millisecond become many times as long where another process has the
# core for one turn of the system's scheduler.
MIN_EXCESS_S = 0.05
# The costs that are compared with were learnt at least so many steps ago, and at most twice as many.
STEPS_BETWEEN_REFERENCES = 256
# Positions attended to, beside the most that were measured by then: a lone stream's always grow beyond that. Even where
# they are all that a step costs, it cannot get slower by more than this, which is less than MAX_SLOWDOWN.
MAX_CONTEXT_RATIO = 3.0
# Fewer steps than these are no sample.
MIN_STEPS = 8


class _Reference(NamedTuple):
    """What steps cost each stage, up to so many decodes and positions that they attend to."""

    costs: list[StageCost]
    max_decodes: int
    max_context: int


class StragglerDetector:
    """Compares a pipeline's steps, in windows of `window_s`, with what `pacing` knew of its stages before."""

    def __init__(self, pacing: Pacing, window_s: float) -> None:
        self._pacing = pacing
        self._window_s = window_s
        self.forget()

    def forget(self) -> None:
        """The stages may be others now."""
        self._latest: _Reference | None = None
        self._reference: _Reference | None = None
        self._num_steps = 0
        self._max_decodes = self._max_context = 0
        self._begin_window(0.0)

    def _begin_window(self, now_s: float) -> None:
        self._since_s = now_s
        self._num_compared = 0
        self._expected_s = [0.0] * self._pacing.num_stages
        self._took_s = [0.0] * self._pacing.num_stages
        self._num_slow = [0] * self._pacing.num_stages

    def observe(self, shape: StepShape, stages: Sequence[StageSeconds], now_s: float) -> int | None:
        """A step came back at `now_s`. Returns the stage that is too slow, if one is."""
        if shape.num_prefill_tokens or len(stages) != self._pacing.num_stages:
            return None
        self._num_steps += 1
        self._max_decodes = max(self._max_decodes, shape.num_decodes)
        self._max_context = max(self._max_context, shape.decode_context)
        if self._num_steps % STEPS_BETWEEN_REFERENCES == 0:
            now = _Reference(self._pacing.stage_costs(), self._max_decodes, self._max_context)
            self._reference, self._latest = self._latest, now
        reference = self._reference
        if reference is None or shape.num_decodes > reference.max_decodes:
            return None
        if shape.decode_context > MAX_CONTEXT_RATIO * reference.max_context:
            return None
        return self._compare(reference.costs, shape, stages, now_s)

    def _compare(
        self, costs: list[StageCost], shape: StepShape, stages: Sequence[StageSeconds], now_s: float
    ) -> int | None:
        if now_s - self._since_s > 2.0 * self._window_s:  # there was a pause
            self._begin_window(now_s)
        self._num_compared += 1
        for index, (cost, stage) in enumerate(zip(costs, stages, strict=True)):
            expected_s = max(cost.decode_s(shape.num_decodes, shape.decode_context), MIN_SECONDS)
            self._expected_s[index] += expected_s
            self._took_s[index] += stage.compute_s
            self._num_slow[index] += stage.compute_s > max(MAX_SLOWDOWN * expected_s, expected_s + MIN_EXCESS_S)
        if now_s - self._since_s < self._window_s or self._num_compared < MIN_STEPS:
            return None
        excess_s = MIN_EXCESS_S * self._num_compared
        sums = zip(self._took_s, self._expected_s, strict=True)
        slow = [
            index
            for index, (took_s, expected_s) in enumerate(sums)
            if took_s > max(MAX_SLOWDOWN * expected_s, expected_s + excess_s)
            and self._num_slow[index] > self._num_compared / 2  # one stall says nothing, however long
        ]
        self._begin_window(now_s)
        return slow[0] if slow else None

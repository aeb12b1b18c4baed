"""Straggler detection: whether a stage has become many times slower than it was. Pure.

A stage says of every step how long it computed it. That is compared with what a step of that shape used to cost this
stage, as a ratio, so that it does not matter whether steps take half a millisecond or half a second. One step says
little: where another process gets the core for one turn, a short step takes many times as long. So time is cut into
slices, each long enough to hold many such turns. A stage's slowness in a slice is the compute time of all its steps
there, divided by what they should have taken. A stage is a straggler when most of the latest slices are far slower than
its slices usually are: noise that is always there is part of what is usual, and a stall or a short burst of noise
spoils too few slices.

What a step should take was learnt at least some hundred steps ago, and not while the stage looked slow: else the
detector would get used to the slowness that it is to find. Only steps that are all decodes count, and only those within
what had been measured by then, or not far beyond: what others would cost is a guess. Nor does the first step with so
many decodes, for which a GPU may record a graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from stagecoach_router.scheduling.cost_model import MIN_SECONDS, StageCost, StepShape
from stagecoach_router.scheduling.pacing import Pacing, StageSeconds

# Beside a stage's usual slowness, which is the lower quartile of its slices before the window, as noise that comes and
# goes is not usual. Neighbours on the same cores may well make it three times as much.
MAX_SLOWDOWN = 5.0
# The least that counts as usual. It is 1 where all is as when the costs were learnt, and less where that was noisier.
MIN_USUAL = 0.5
# A window has so many slices, and in so many of them a straggler is too slow.
SLICES_PER_WINDOW = 8
MIN_SLOW_SLICES = 6
# Slices before the window, from which is known what is usual: at least, and at most.
MIN_USUAL_SLICES = 8
MAX_USUAL_SLICES = 64
# The costs that are compared with were learnt at least so many steps ago.
STEPS_BETWEEN_REFERENCES = 256
# Positions attended to, in the step and by each row, beside the most that were measured by then: a lone stream's always
# grow beyond that. Even where they are all that a step costs, it cannot get slower by more than this, which is less
# than MAX_SLOWDOWN.
MAX_CONTEXT_RATIO = 3.0


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Which steps were measured: the least and the most of each quantity, and the most positions for each row."""

    least: StepShape
    most: StepShape
    max_row_context: float

    @classmethod
    def of(cls, shape: StepShape) -> _Shapes:
        """Of a single step."""
        return cls(shape, shape, shape.decode_context / shape.num_decodes)

    def joined(self, other: _Shapes) -> _Shapes:
        """Of the steps of both."""
        return _Shapes(
            StepShape(*map(min, self.least, other.least)),
            StepShape(*map(max, self.most, other.most)),
            max(self.max_row_context, other.max_row_context),
        )

    def is_near(self, shape: StepShape) -> bool:
        """Whether a step is no larger than these, or only a little longer."""
        return (
            shape.num_decodes <= self.most.num_decodes
            and shape.decode_context <= MAX_CONTEXT_RATIO * self.most.decode_context
            and shape.decode_context <= MAX_CONTEXT_RATIO * self.max_row_context * shape.num_decodes
        )

    def expected_s(self, cost: StageCost, shape: StepShape) -> float:
        """What a step should take. One that is smaller than any of these may take as long as the smallest."""
        larger = StepShape(*map(max, shape, self.least))
        return max(cost.decode_s(larger.num_decodes, larger.decode_context), MIN_SECONDS)


@dataclass(frozen=True, slots=True)
class _Reference:
    """What steps of these shapes cost each stage at some time."""

    costs: list[StageCost]
    shapes: _Shapes


@dataclass(slots=True)
class _StageHistory:
    """How slow a stage was: so far in the slice that goes on, and in the latest ones."""

    took_s: float = 0.0
    expected_s: float = 0.0
    slices: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_USUAL_SLICES + SLICES_PER_WINDOW))
    looks_slow: bool = False  # it was too slow in the last slice: that may be how a straggler begins

    def end_slice(self) -> None:
        """Begins the next slice. One in which no step could be compared says nothing, and is forgotten."""
        self.looks_slow = False
        if self.expected_s > 0.0:
            self.slices.append(self.took_s / self.expected_s)
            self.looks_slow = self.slices[-1] > self._limit
        self.took_s = self.expected_s = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether it was too slow in most of the latest window."""
        window, limit = list(self.slices)[-SLICES_PER_WINDOW:], self._limit
        return sum(slowness > limit for slowness in window) >= MIN_SLOW_SLICES

    @property
    def _limit(self) -> float:
        before = list(self.slices)[:-SLICES_PER_WINDOW]
        usual = quantiles(before, n=4)[0] if len(before) >= MIN_USUAL_SLICES else 1.0
        return MAX_SLOWDOWN * max(MIN_USUAL, usual)


class StragglerDetector:
    """Finds the straggler among the stages whose steps `pacing` learns from.

    It takes about `window_s`, or the time of SLICES_PER_WINDOW steps where that is longer.
    """

    def __init__(self, pacing: Pacing, window_s: float) -> None:
        self._pacing = pacing
        self._slice_s = window_s / SLICES_PER_WINDOW
        self._slice_began_s: float | None = None
        self._stages = [_StageHistory() for _ in range(pacing.num_stages)]
        self._shapes: _Shapes | None = None
        self._reference: _Reference | None = None
        self._next_reference: _Reference | None = None
        self._num_steps = 0  # since the next reference was learnt
        self._last_s = 0.0  # when the last step came back
        self._met: set[int] = set()  # numbers of decodes that a step had

    def observe(
        self, shape: StepShape, stages: Sequence[StageSeconds], round_trip_s: float, now_s: float
    ) -> int | None:
        """A step came back at `now_s`. Returns the index of the stage that is a straggler, if one is."""
        if shape.num_prefill_tokens or not shape.num_decodes or len(stages) != len(self._stages):
            return None
        if self._slice_began_s is None:
            self._slice_began_s = self._last_s = now_s
        was_idle = now_s - self._last_s - round_trip_s > self._slice_s
        is_new = shape.num_decodes not in self._met
        self._met.add(shape.num_decodes)
        self._last_s = now_s
        self._num_steps += 1
        self._shapes = _Shapes.of(shape) if self._shapes is None else self._shapes.joined(_Shapes.of(shape))
        # Else caches and clocks may be cold, or a GPU records a graph for steps of this size.
        if not was_idle and not is_new:
            self._compare(shape, stages)
        if now_s - self._slice_began_s < self._slice_s:
            return None
        self._slice_began_s = now_s
        return self._end_slice(self._shapes)

    def _compare(self, shape: StepShape, stages: Sequence[StageSeconds]) -> None:
        reference = self._reference
        if reference is None or not reference.shapes.is_near(shape):
            return
        for history, cost, stage in zip(self._stages, reference.costs, stages, strict=True):
            history.took_s += stage.compute_s
            history.expected_s += reference.shapes.expected_s(cost, shape)

    def _end_slice(self, shapes: _Shapes) -> int | None:
        for history in self._stages:
            history.end_slice()
        if self._num_steps >= STEPS_BETWEEN_REFERENCES and not any(history.looks_slow for history in self._stages):
            learnt = _Reference(self._pacing.stage_costs(), shapes)
            self._reference, self._next_reference = self._next_reference or learnt, learnt
            self._num_steps = 0
        for index, history in enumerate(self._stages):
            if history.is_slow:
                return index
        return None

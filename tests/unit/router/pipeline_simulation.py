"""A pipeline in virtual time that the real scheduler drives: stages with given costs, hops with given delays."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.scheduling import sequence as token_log
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.cost_model import StepShape
from stagecoach_router.scheduling.pacing import Pacing, StageSeconds
from stagecoach_router.scheduling.scheduler import Scheduler

StageCostFunction = Callable[[StepShape], float]


def stage_cost(
    fixed_s: float, row_s: float, token_s: float | None = None, position_s: float = 0.0, pair_s: float = 0.0
) -> StageCostFunction:
    """A stage that takes so long for a step; `token_s` of prefill is that of a row by default."""

    def cost_s(shape: StepShape) -> float:
        prefill_s = (row_s if token_s is None else token_s) * shape.num_prefill_tokens + pair_s * shape.prefill_context
        return fixed_s + row_s * shape.num_decodes + position_s * shape.decode_context + prefill_s

    return cost_s


class Simulation:
    """`hop_s` is the time from the router to the first stage, between stages, and from the last one back."""

    def __init__(
        self,
        stages: Sequence[StageCostFunction],
        hop_s: float = 0.0,
        *,
        noise: float = 0.0,
        lanes: int = 0,
        max_lanes: int = 8,
        timed: bool = True,
        max_running: int = 64,
    ) -> None:
        self.stages = list(stages)
        self.hop_s = hop_s
        self.pacing = Pacing(len(stages), lanes)
        self.pacing.limit_lanes(max_lanes)
        self.scheduler = Scheduler(
            BlockManager(8192, 16),
            max_batch_tokens=512,
            max_running=max_running,
            max_waiting=1000,
            context_length=8192,
            pacing=self.pacing,
        )
        self.now_s = 0.0
        self.chunks: list[tuple[float, int]] = []  # (when it left, prefill tokens)
        self.arrivals: dict[int, list[float]] = {}  # seq_id -> when its tokens came
        self.added_s: dict[int, float] = {}
        self.lanes_seen: list[int] = []
        self._noise = random.Random(1), noise
        self._timed = timed
        self._free_at = [0.0] * len(stages)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, int, object, float, list[StageSeconds]]] = []

    def add(self, prompt_tokens: int, output_tokens: int) -> token_log.Sequence:
        """A request comes now. No two share a prefix."""
        seq_id = len(self.added_s)
        tokens = [seq_id, *[0] * (prompt_tokens - 1)]
        params = SamplingParams(max_tokens=output_tokens)
        sequence = token_log.Sequence(seq_id=seq_id, prompt_tokens=tokens, params=params, seed=0)
        self.scheduler.add(sequence)
        self.added_s[seq_id] = self.now_s
        self.arrivals[seq_id] = []
        self._pump()
        return sequence

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Until then, or all is done."""
        while self._events and not until():
            self._advance()

    def run_for(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        self.run(lambda: self._events[0][0] > end_s)

    def tokens_between(self, begin_s: float, end_s: float) -> int:
        return sum(begin_s < time_s <= end_s for times in self.arrivals.values() for time_s in times)

    def gaps_s(self, seq_ids: Sequence[int], begin_s: float, end_s: float) -> list[float]:
        """Inter-token latencies of these sequences that ended within the interval."""
        return [
            later - earlier
            for seq_id in seq_ids
            for earlier, later in itertools.pairwise(self.arrivals[seq_id])
            if begin_s < later <= end_s
        ]

    def _pump(self) -> None:
        while (plan := self.scheduler.schedule()) is not None:
            assert self.scheduler.num_in_flight <= self.pacing.max_lanes
            tokens = StepShape.of(plan.rows).num_prefill_tokens
            if tokens:
                self.chunks.append((self.now_s, tokens))
            self.lanes_seen.append(self.scheduler.num_lanes)
            self._send(0, plan, self.now_s, [])

    def _send(self, stage: int, plan: object, sent_s: float, timings: list[StageSeconds]) -> None:
        heapq.heappush(self._events, (self.now_s + self.hop_s, next(self._numbers), stage, plan, sent_s, timings))

    def _advance(self) -> None:
        self.now_s, _, stage, plan, sent_s, timings = heapq.heappop(self._events)
        if stage < 0:  # the stage ~stage has computed it
            self._send(~stage + 1, plan, sent_s, timings)
        elif stage < len(self.stages):
            begin_s = max(self.now_s, self._free_at[stage])
            dice, noise = self._noise
            compute_s = self.stages[stage](StepShape.of(plan.rows)) * (1 + noise * dice.random())
            self._free_at[stage] = begin_s + compute_s
            timing = StageSeconds(begin_s - self.now_s, compute_s)
            event = (self._free_at[stage], next(self._numbers), ~stage, plan, sent_s, [*timings, timing])
            heapq.heappush(self._events, event)
        else:
            self._complete(plan, sent_s, timings)

    def _complete(self, plan, sent_s: float, timings: list[StageSeconds]) -> None:
        if self._timed:
            self.pacing.observe(StepShape.of(plan.rows), timings, self.now_s - sent_s)
        for row in self.scheduler.complete(plan):
            self.arrivals[row.sequence.seq_id].append(self.now_s)
            self.scheduler.append_token(row.sequence, 1)
            if row.sequence.num_tokens == row.sequence.token_limit:
                self.scheduler.remove(row.sequence)
        self._pump()

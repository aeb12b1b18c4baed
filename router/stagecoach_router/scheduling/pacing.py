"""How many steps are in flight, and how long a prefill chunk is, decided from what steps were measured to take. Pure.

With L lanes of n rows each, a lane's next step cannot leave before its last one is back, and no stage can do two steps
at a time. So the time from one token of a sequence to the next is

    period(L) = max(L * bottleneck(n), sum over stages(n) + hops)

where bottleneck is the slowest stage's compute time of a step, and hops all of a round trip that no stage computes:
networks, frames, event loops (time in a stage's queue is left out: that is what lanes do to each other). Far machines
make the second term large, so more lanes fill the pipe; where reading the weights costs more than the rows do, each
lane adds to the first, and few lanes are best.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import ceil, isfinite
from statistics import median
from typing import NamedTuple

from stagecoach_router.scheduling.cost_model import MIN_OBSERVATIONS, MIN_SECONDS, MIN_SPAN, StageCost, StepShape
from stagecoach_router.scheduling.sequence import Sequence as TokenLog

# More are never chosen: each is looked at whenever the costs change.
MAX_LANES = 64
NO_LIMIT = 1 << 30
# Decisions that are remembered until the costs change.
MAX_DECIDED = 1024
# The number of lanes changes only for at least this gain, so that noise does not make it flap.
MIN_GAIN = 0.05
# As long as it is unknown what a row costs, a lane is added where stages idle more than this part of the time.
MAX_IDLE = 0.1
# While a prompt is computed, sequences that decode get their tokens at intervals of up to (1 + this) times as long.
MAX_SLOWDOWN = 0.9
# More where several prompts wait: (1 + this * (waiting - 1) / decoding). A burst is to be through soon, or its first
# sequences decode in steps that are nearly empty, and its last ones still do when the others are gone.
CROWDING_WEIGHT = 8.0
# Chunks that wait before the first stage while nobody decodes. They depend on no result, so that it never stands idle
# because another stage took longer than it should have.
SPARE_CHUNKS = 1
# A prompt gets on by at least so many tokens a step.
MIN_SHARED_CHUNK_TOKENS = 4
# Prefill that does not fill the lanes is spread over them, so that the stages work on it at the same time; but until
# it is known what a chunk costs, not in chunks below this, which could cost more than the waiting they save.
MIN_EVEN_CHUNK_TOKENS = 64
EVEN_CHUNKS_PER_LANE = 2
# How many chunks a prompt is tried to be cut into: 1, 2, 3, 4, 6, 8, 11, ... 362.
CHUNK_COUNTS = sorted({round(2 ** (exponent / 2)) for exponent in range(18)})
# What a step costs that is so many times as large as any before is not predicted.
FAR_BEYOND = 2
# By so much clocks of different machines may differ in speed.
CLOCK_TOLERANCE = 1.01
# Of the latest steps, whose median says how long the hops are.
NUM_HOP_SAMPLES = 64


class StageSeconds(NamedTuple):
    """Where one step's time went at one stage."""

    queue_s: float
    compute_s: float


class Prompts(NamedTuple):
    """What is to be prefilled."""

    num_sequences: int = 0
    num_tokens: int = 0  # of their prompts, with what has been dispatched of them
    start: int = 0  # where the first one's next chunk begins

    @classmethod
    def of(cls, sequences: Sequence[TokenLog]) -> Prompts:
        """What of these is to be computed or is under way: what was found in the prefix cache is neither."""
        if not sequences:
            return NO_PROMPTS
        num_tokens = sum(sequence.num_tokens - sequence.num_reused for sequence in sequences)
        return cls(len(sequences), num_tokens, sequences[0].num_computed)


class Pace(NamedTuple):
    """How many steps may fly, and the most prefill tokens of one step (None: nothing is known about that yet)."""

    num_lanes: int
    chunk_tokens: int | None = None


NO_PROMPTS = Prompts()


def even_chunk_tokens(num_left: Iterable[int], num_lanes: int, max_batch_tokens: int) -> int:
    """The chunk where nothing is known of costs, and `num_left` tokens of each prompt are to be prefilled.

    It is a part of a lane's share of them: the second stage waits for the first chunk, so that is to be short. Where
    one lane serves, nobody waits.
    """
    num_chunks = num_lanes * EVEN_CHUNKS_PER_LANE if num_lanes > 1 else 1
    num_tokens = 0
    for tokens in num_left:
        num_tokens += tokens
        if num_tokens >= num_chunks * max_batch_tokens:
            return max_batch_tokens
    return max(MIN_EVEN_CHUNK_TOKENS, -(-num_tokens // num_chunks))


class Pacing:
    """Learns what steps cost on a pipeline of `num_stages`, and decides its pace.

    `lanes` fixes their number; 0: it is chosen, from 1 to `limit_lanes`' limit, and is that of the stages until
    something has been measured.
    """

    def __init__(self, num_stages: int, lanes: int = 0) -> None:
        assert num_stages >= 1, num_stages
        assert lanes >= 0, lanes
        self.num_stages = num_stages
        self._fixed_lanes = lanes
        self.max_lanes = lanes or num_stages
        self._max_rows = self._max_tokens = NO_LIMIT
        self.reset()

    def limit_lanes(self, max_lanes: int) -> None:
        """Chooses no more than `max_lanes` from now on, but as many as there are stages if need be.

        A stage takes no more steps than it gives credits for, and one that waits for a credit looks like a long hop.
        """
        self.max_lanes = self._fixed_lanes or max(min(max_lanes, MAX_LANES), self.num_stages)
        self._decided.clear()

    def limit_steps(self, max_rows: int, max_tokens: int) -> None:
        """A step holds no more than `max_rows` decodes, nor than `max_tokens` tokens in all."""
        self._max_rows, self._max_tokens = min(max_rows, max_tokens), max_tokens
        self._decided.clear()

    def reset(self) -> None:
        """Forgets everything: the stages may be others now."""
        self._stages = [StageCost() for _ in range(self.num_stages)]
        self._hop_samples: deque[float] = deque(maxlen=NUM_HOP_SAMPLES)
        self._hops_s = 0.0  # of a decode step's round trip, what no stage computed or queued: the latest ones' median
        self._largest = StepShape()  # of what was met, field by field
        self._row_context = 0.0  # positions that a decode attends to, lately
        self._decode_lanes = self._fixed_lanes or self.num_stages
        self._decided: dict[tuple[int, Prompts], Pace] = {}  # until the costs change

    def observe(self, shape: StepShape, stages: Sequence[StageSeconds], round_trip_s: float) -> None:
        """Learns from a step that came back.

        What cannot be is left out: figures of another number of stages, or not in [0, inf), or that come to more than
        the round trip by our own clock.
        """
        times = [round_trip_s, *(seconds for stage in stages for seconds in stage)]
        if len(stages) != self.num_stages or not all(isfinite(seconds) and seconds >= 0.0 for seconds in times):
            return
        if sum(map(sum, stages)) > CLOCK_TOLERANCE * round_trip_s:
            return
        changed = [
            cost.observe(shape, stage.compute_s) for cost, stage in zip(self._stages, stages, strict=True)
        ]  # all of them: no short cut
        self._largest = StepShape(*map(max, shape, self._largest))
        if shape.num_decodes:
            self._row_context = shape.decode_context / shape.num_decodes
        if not shape.num_prefill_tokens:
            self._hop_samples.append(max(0.0, round_trip_s - sum(sum(stage) for stage in stages)))
        if any(changed):
            self._hops_s = median(self._hop_samples) if len(self._hop_samples) >= MIN_OBSERVATIONS else 0.0
            self._decided.clear()

    def stage_costs(self) -> list[StageCost]:
        """A copy of what is known now of each stage, to be compared with what it takes later."""
        return [stage.frozen() for stage in self._stages]

    def expected_s(self, shape: StepShape) -> float | None:
        """What a step's whole way takes when it waits for no other. None: too little is known of such steps.

        Nor is anything known of steps much larger than any that were met: a fit says nothing about them.
        """
        if any(size > FAR_BEYOND * met for size, met in zip(shape, self._largest, strict=True)):
            return None
        costs = [stage.step_s(shape) for stage in self._stages]
        known = [cost for cost in costs if cost is not None]
        return sum(known) + self._hops_s if len(known) == len(costs) else None

    def token_s(self) -> float | None:
        """The time between two tokens of a sequence that is alone. None: too little is known."""
        known = all(stage.decodes.is_known for stage in self._stages)
        return self._period(1, 1) if known else None

    def pace(self, num_decodes: int, prompts: Prompts = NO_PROMPTS) -> Pace:
        """The pace for `num_decodes` sequences that have their first token, beside `prompts` to be computed."""
        # A chunk's place changes its cost a little only: one answer does for some positions.
        prompts = prompts._replace(start=prompts.start // 64 * 64)
        key = (num_decodes, prompts)
        pace = self._decided.get(key)
        if pace is None:
            if len(self._decided) >= MAX_DECIDED:
                self._decided.clear()
            pace = self._decided[key] = self._decide(num_decodes, prompts)
        return pace

    def _decide(self, num_decodes: int, prompts: Prompts) -> Pace:
        if num_decodes:
            self._decode_lanes = self._choose_lanes(num_decodes)
            quiet = Pace(self._decode_lanes)
            return self._beside_decodes(num_decodes, prompts, quiet) if prompts.num_sequences else quiet
        return self._without_decodes(prompts) if prompts.num_sequences else Pace(self._decode_lanes)

    def _clamp(self, num_lanes: int) -> int:
        return self._fixed_lanes or max(1, min(num_lanes, self.max_lanes))

    # ---- decodes

    def _stage_costs(self, num_rows: int) -> list[float]:
        return [stage.decode_s(num_rows, self._row_context * num_rows) for stage in self._stages]

    def _period(self, num_lanes: int, num_decodes: int) -> float:
        """Seconds from one token of a sequence to its next."""
        # Uneven lanes: their steps' costs add up to as many fixed parts as there are lanes, and every row once.
        used = min(num_lanes, num_decodes)
        whole = self._stage_costs(num_decodes)
        nothing = self._stage_costs(0)
        bottleneck = max(all_s + (used - 1) * fixed_s for all_s, fixed_s in zip(whole, nothing, strict=True))
        return max(bottleneck, sum(self._stage_costs(-(-num_decodes // used))) + self._hops_s)

    def _choose_lanes(self, num_decodes: int) -> int:
        current = self._clamp(self._decode_lanes)
        if self._fixed_lanes or not all(stage.decodes.is_known for stage in self._stages):
            return current
        if self._stages[0].decodes.span < MIN_SPAN:
            return self._try_one_more(current, num_decodes)
        least = min(-(-num_decodes // self._max_rows), self.max_lanes)  # with fewer, some wait for another step
        most = max(current, min(self.max_lanes, num_decodes), least)
        periods = {lanes: self._period(lanes, num_decodes) for lanes in range(least, most + 1)}
        if current < least:
            return least
        best = min(periods, key=lambda lanes: (periods[lanes], lanes))
        return best if periods[best] < (1.0 - MIN_GAIN) * periods[current] else current

    def _try_one_more(self, current: int, num_decodes: int) -> int:
        """All steps had about as many rows, so what a row costs is unknown. Smaller steps will tell."""
        costs = self._stage_costs(-(-num_decodes // current))
        idles = current * max(costs) < (1.0 - MAX_IDLE) * (sum(costs) + self._hops_s)
        return self._clamp(current + 1) if idles and current < num_decodes else current

    # ---- prefill

    def _beside_decodes(self, num_decodes: int, prompts: Prompts, quiet: Pace) -> Pace:
        """The lanes that get most prefill done within the period that decodes are to have, and their chunk."""
        token_costs = [stage.added_token_s(prompts.start) for stage in self._stages]
        per_token = [cost for cost in token_costs if cost is not None]
        if len(per_token) < self.num_stages or not all(stage.decodes.is_known for stage in self._stages):
            return Pace(max(quiet.num_lanes, self._clamp(self.num_stages)))
        crowding = CROWDING_WEIGHT * (prompts.num_sequences - 1) / num_decodes
        allowed_s = self._period(quiet.num_lanes, num_decodes) * (1.0 + max(MAX_SLOWDOWN, crowding))
        best, best_work = Pace(quiet.num_lanes, MIN_SHARED_CHUNK_TOKENS), 0.0
        for num_lanes in range(quiet.num_lanes, self.max_lanes + 1):
            costs = self._stage_costs(-(-num_decodes // num_lanes))
            chunk = (allowed_s - self._hops_s - sum(costs)) / max(sum(per_token), 1e-12)
            for cost, token_s in zip(costs, per_token, strict=True):
                chunk = min(chunk, (allowed_s / num_lanes - cost) / max(token_s, 1e-12))
            chunk = min(chunk, self._max_tokens)
            if num_lanes * chunk > (1.0 + MIN_GAIN) * best_work:
                best = Pace(num_lanes, max(MIN_SHARED_CHUNK_TOKENS, int(chunk)))
                best_work = num_lanes * chunk
        return best

    def _without_decodes(self, prompts: Prompts) -> Pace:
        """Chunks of one size that bring the last token soonest.

        k chunks of P / k tokens take the slowest stage k times its time for one, and the last one then has to pass the
        others: (k - 1) * bottleneck(P / k) + sum over stages(P / k). All of one size, since each stage waits for the
        largest.
        """
        if self.num_stages == 1:
            return Pace(self._clamp(1))
        unknown = Pace(self._clamp(self.num_stages + SPARE_CHUNKS))
        if not all(stage.prefill.is_known for stage in self._stages):
            return unknown
        if not prompts.num_tokens or self._stages[0].decodes.span < MIN_SPAN:
            return unknown  # only one size of step was met: what is fixed is not known
        middle = prompts.num_tokens / prompts.num_sequences / 2
        fixed = [stage.fixed_s for stage in self._stages]
        per_token = [stage.prefill.parts[0] + stage.prefill.parts[1] * middle for stage in self._stages]

        def wait_s(num_chunks: int) -> float:
            times = [a + c * prompts.num_tokens / num_chunks for a, c in zip(fixed, per_token, strict=True)]
            return (num_chunks - 1) * max(times) + sum(times)

        num_chunks = min((count for count in CHUNK_COUNTS if count <= prompts.num_tokens), key=wait_s)
        chunk = min(ceil(prompts.num_tokens / num_chunks), self._max_tokens)
        costs = [a + c * chunk for a, c in zip(fixed, per_token, strict=True)]
        in_flight = ceil((1.0 - MAX_IDLE) * (sum(costs) + self._hops_s) / max(*costs, MIN_SECONDS))
        return Pace(self._clamp(max(in_flight, 1) + SPARE_CHUNKS), chunk)

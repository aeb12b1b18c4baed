"""What a step costs a stage, learnt from steps that were timed. Pure.

A cost is a sum of parts that each grow with one quantity of the step, none of them negative: a fixed part (reading the
weights, starting kernels), one for each row or token, one for each position attended to. The parts are fitted by least
squares of the relative errors: a step that took ten times as long as it should have (somebody else had the core) then
counts a hundredth, and decodes of milliseconds count as much as chunks of a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2, sqrt
from typing import NamedTuple, Protocol

# Of the observations of steps of one size, the last so many count.
MEMORY_STEPS = 32
# What other sizes said is forgotten more slowly: a size that is not met any more is still worth knowing.
SLOW_MEMORY_STEPS = 4096
# Fewer observations than these say nothing.
MIN_OBSERVATIONS = 4
# Costs are fitted again after so many observations; until then the former fit stands.
STEPS_BETWEEN_FITS = 8
# Row counts that differ by this factor tell what is fixed from what each row adds.
MIN_SPAN = 1.2
SIZES_PER_OCTAVE = 4
MIN_SECONDS = 1e-6  # no step takes less
_PULL = 1e-3  # of a fit towards the former one, against drift where the observations leave a choice


class RowLike(Protocol):
    """What a row's cost depends on."""

    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


class StepShape(NamedTuple):
    """What a step's cost depends on. A row of one token is a decode, whatever it is computed for."""

    num_decodes: int = 0
    decode_context: int = 0  # positions that they attend to, all together
    num_prefill_tokens: int = 0
    prefill_context: int = 0  # the same of the tokens of longer rows: pairs of query and key

    @classmethod
    def of(cls, rows: Iterable[RowLike]) -> StepShape:
        """The shape of a step of these rows."""
        num_decodes = decode_context = num_tokens = prefill_context = 0
        for row in rows:
            n = row.num_tokens
            if n == 1:
                num_decodes += 1
                decode_context += row.start + 1
            else:
                num_tokens += n
                prefill_context += n * row.start + n * (n + 1) // 2
        return cls(num_decodes, decode_context, num_tokens, prefill_context)


@dataclass(slots=True)
class _Observations:
    """What steps of one size told: weighted sums of x x^T and x y, in which the last steps count most."""

    products: list[float]  # row by row
    targets: list[float]
    weight: float = 0.0  # at most MEMORY_STEPS
    last: int = 0  # number of the latest observation


class CostFit:
    """cost ~ sum of parts[i] * features[i], parts >= 0, from observations that come one at a time."""

    def __init__(self, num_features: int) -> None:
        self.parts = [0.0] * num_features
        self.num_observations = 0
        self._sizes: dict[int, _Observations] = {}
        self._num_until_fit = MIN_OBSERVATIONS

    @property
    def is_known(self) -> bool:
        """Whether there were enough observations for `parts` to say something."""
        return self.num_observations >= MIN_OBSERVATIONS

    @property
    def span(self) -> float:
        """The largest size that was met, divided by the smallest."""
        sizes = [size for size, seen in self._sizes.items() if seen.weight > 1]
        return 2.0 ** ((max(sizes) - min(sizes)) / SIZES_PER_OCTAVE) if sizes else 1.0

    def frozen(self) -> CostFit:
        """A copy of the parts, which learns nothing from what this one is told."""
        copy = CostFit(len(self.parts))
        copy.parts, copy.num_observations = list(self.parts), self.num_observations
        return copy

    def predict(self, features: Sequence[float]) -> float:
        """The cost of a step with these features; in the unit of what was observed."""
        return sum(part * feature for part, feature in zip(self.parts, features, strict=True))

    def observe(self, size: int, features: Sequence[float], cost: float, scale: float) -> bool:
        """Learns that a step of `size` (rows or tokens, >= 1) cost `cost`. True: the parts are new.

        `scale` is what errors are relative to: the step's cost, or that of the whole of which this is a part. An
        observation of none is left out.
        """
        if scale <= 0.0:
            return False
        self.num_observations += 1
        key = round(SIZES_PER_OCTAVE * log2(size))
        n = len(features)
        seen = self._sizes.get(key)
        if seen is None:
            seen = self._sizes[key] = _Observations([0.0] * (n * n), [0.0] * n)
        # A time far too short must not outweigh the others.
        weight = 1.0 / max(scale, self.predict(features), MIN_SECONDS) ** 2
        keep = 1.0 - 1.0 / MEMORY_STEPS
        for i, x in enumerate(features):
            seen.targets[i] = keep * seen.targets[i] + weight * x * cost
            for j, other in enumerate(features):
                seen.products[i * n + j] = keep * seen.products[i * n + j] + weight * x * other
        seen.weight = keep * seen.weight + 1.0
        seen.last = self.num_observations
        self._num_until_fit -= 1
        if self._num_until_fit > 0:
            return False
        self._fit()
        self._num_until_fit = STEPS_BETWEEN_FITS
        return True

    def _fit(self) -> None:
        """Solves the normal equations, each part held at or above zero."""
        n = len(self.parts)
        products, targets = [0.0] * (n * n), [0.0] * n
        for seen in self._sizes.values():
            age = (1.0 - 1.0 / SLOW_MEMORY_STEPS) ** (self.num_observations - seen.last)
            products = [total + age * part for total, part in zip(products, seen.products, strict=True)]
            targets = [total + age * part for total, part in zip(targets, seen.targets, strict=True)]
        # Each feature in units of its own size, so that rows and millions of positions can be solved for together.
        sizes = [sqrt(products[i * n + i]) for i in range(n)]
        scaled = [products[i * n + j] / ((sizes[i] * sizes[j]) or 1.0) for i in range(n) for j in range(n)]
        goals = [target / (size or 1.0) for target, size in zip(targets, sizes, strict=True)]
        for i in range(n):
            scaled[i * n + i] += _PULL
            goals[i] += _PULL * self.parts[i] * sizes[i]
        solution = solve_nonnegative(scaled, goals)
        self.parts = [
            part / size if size else former for part, size, former in zip(solution, sizes, self.parts, strict=True)
        ]


def solve_nonnegative(products: Sequence[float], goals: Sequence[float]) -> list[float]:
    """The x >= 0 for which x^T A x / 2 - b^T x is least; A, row by row, must be positive definite, and small.

    The least of the solutions of all subsets of the parts, the others being 0. It is plain Python, as the whole fit is:
    for three parts arrays cost more than the arithmetic, and it runs between two steps.
    """
    n = len(goals)
    best, best_value = [0.0] * n, 0.0
    for subset in range((1 << n) - 1, 0, -1):
        chosen = [i for i in range(n) if subset >> i & 1]
        found = _solve([[products[i * n + j] for j in chosen] + [goals[i]] for i in chosen])
        if min(found) < 0.0:
            continue
        value = -sum(goals[i] * x for i, x in zip(chosen, found, strict=True)) / 2
        if value < best_value:
            best, best_value = [0.0] * n, value
            for i, x in zip(chosen, found, strict=True):
                best[i] = x
        if len(chosen) == n:
            break  # no constraint holds it back
    return best


def _solve(rows: list[list[float]]) -> list[float]:
    """Gauss-Jordan elimination of [A | b], A positive definite."""
    for i, pivot_row in enumerate(rows):
        pivot = pivot_row[i]
        rows[i] = pivot_row = [value / pivot for value in pivot_row]
        for k, row in enumerate(rows):
            if k != i and row[i]:
                rows[k] = [value - row[i] * above for value, above in zip(row, pivot_row, strict=True)]
    return [row[-1] for row in rows]


class StageCost:
    """One stage's compute time of a step, in seconds.

    Decodes alone, prefill alone, and what prefill adds to decodes are learnt apart: kernels for few and for many tokens
    differ. What is fixed (reading the weights, starting kernels) is learnt from decodes only, and taken for the same in
    prefill: chunks vary too little in size to tell it from what their tokens cost.
    """

    def __init__(self) -> None:
        self.decodes = CostFit(3)  # fixed, each row, each position attended to
        self.prefill = CostFit(2)  # each token, each pair of query and key
        self.added = CostFit(2)  # each token, each pair, beside decodes

    def frozen(self) -> StageCost:
        """What is known now, to be compared with what will be learnt later."""
        copy = StageCost()
        copy.decodes, copy.prefill, copy.added = self.decodes.frozen(), self.prefill.frozen(), self.added.frozen()
        return copy

    def observe(self, shape: StepShape, compute_s: float) -> bool:
        """Learns from one step. True: what is predicted may have changed."""
        rows, tokens = shape.num_decodes, shape.num_prefill_tokens
        if not tokens:
            return self.decodes.observe(rows, (1.0, rows, shape.decode_context), compute_s, compute_s)
        if not rows:
            beyond_fixed_s = max(0.0, compute_s - self.fixed_s)
            return self.prefill.observe(tokens, (tokens, shape.prefill_context), beyond_fixed_s, compute_s)
        if not self.decodes.is_known:
            return False
        if not self.added.num_observations:
            self.added.parts = list(self.prefill.parts)  # chunks near a prompt's start do not tell tokens from pairs
        added_s = max(0.0, compute_s - self.decode_s(rows, shape.decode_context))
        return self.added.observe(tokens, (tokens, shape.prefill_context), added_s, compute_s)

    @property
    def fixed_s(self) -> float:
        """What a step costs before its first row; 0 as long as nothing is known."""
        return self.decodes.parts[0]

    def step_s(self, shape: StepShape) -> float | None:
        """What a whole step costs. None: too little is known of such steps."""
        if not self.decodes.is_known:
            return None
        seconds = self.decode_s(shape.num_decodes, shape.decode_context)
        if shape.num_prefill_tokens:
            fit = self.added if shape.num_decodes and self.added.is_known else self.prefill
            if not fit.is_known:
                return None
            seconds += fit.predict((shape.num_prefill_tokens, shape.prefill_context))
        return seconds

    def decode_s(self, num_rows: float, context: float) -> float:
        """What a step of `num_rows` decodes costs that attend to `context` positions in all."""
        fixed, per_row, per_position = self.decodes.parts
        return fixed + per_row * num_rows + per_position * context

    def added_token_s(self, start: float) -> float | None:
        """What a prefill token at position `start` adds to a step of decodes. None: nothing is known of prefill."""
        if self.added.is_known:
            per_token, per_pair = self.added.parts
        elif self.prefill.is_known:  # a first guess
            per_token, per_pair = self.prefill.parts
        else:
            return None
        return per_token + per_pair * start

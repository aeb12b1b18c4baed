"""What the pacing learns from timed steps, and decides from it."""

import math
import random

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_router.scheduling.cost_model import CostFit, StageCost, StepShape, solve_nonnegative
from stagecoach_router.scheduling.pacing import MIN_SHARED_CHUNK_TOKENS, Pace, Pacing, Prompts, StageSeconds
from tests.unit.router.pipeline_simulation import stage_cost

seconds = st.floats(1e-5, 0.1)


def decode(rows, context=200):
    return StepShape(rows, rows * context)


def chunk(tokens, start=0, rows=0):
    return StepShape(rows, rows * 200, tokens, tokens * start + tokens * (tokens + 1) // 2)


def taught(stages, hops_s=0.0, *, rows=(1, 2, 4, 8, 16, 32), chunks=(64, 128, 256), lanes=0, max_lanes=8, noise=0.0):
    """A pacing that has seen steps of a pipeline with these costs."""
    pacing = Pacing(len(stages), lanes)
    pacing.limit_lanes(max_lanes)
    dice = random.Random(3)
    for _ in range(8):
        for shape in [*map(decode, rows), *map(chunk, chunks)]:
            times = [cost(shape) * (1 + noise * dice.random()) for cost in stages]
            pacing.observe(shape, [StageSeconds(0.0, time) for time in times], sum(times) + hops_s)
    return pacing


# ---- costs


@given(st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=3, max_size=6), st.data())
def test_least_squares_with_no_part_below_zero(features, data):
    costs = data.draw(st.lists(st.floats(-5, 5), min_size=len(features), max_size=len(features)))
    matrix = np.vstack([np.array(features), 0.1 * np.eye(3)])
    target = np.array([*costs, 0, 0, 0])
    found = solve_nonnegative((matrix.T @ matrix).ravel().tolist(), (matrix.T @ target).tolist())
    expected, _ = scipy.optimize.nnls(matrix, target)
    assert np.allclose(found, expected, atol=1e-6)


@given(fixed_s=seconds, row_s=seconds, seed=st.integers(0, 1000), noise=st.floats(0, 0.2))
def test_costs_are_learnt_through_noise_and_outliers(fixed_s, row_s, seed, noise):
    dice = random.Random(seed)
    true_s = stage_cost(fixed_s, row_s)
    cost = StageCost()
    for number in range(300):
        shape = decode(dice.choice([1, 2, 5, 8, 13, 21, 32]))
        factor = dice.uniform(1 - noise, 1 + noise)
        if number > 10 and dice.random() < 0.03:
            factor = dice.choice([20.0, 0.001, 0.0])  # somebody else had the core; a broken clock
        cost.observe(shape, true_s(shape) * factor)
    for rows in (1, 4, 10, 32):
        assert cost.decode_s(rows, rows * 200) == pytest.approx(true_s(decode(rows)), rel=0.25)


def test_a_machine_that_slows_down_is_noticed():
    pacing_cost = StageCost()
    for factor in (1.0, 3.0):
        for _ in range(200):
            for rows in (4, 8):
                pacing_cost.observe(decode(rows), factor * (0.01 + 0.001 * rows))
        assert pacing_cost.decode_s(8, 1600) == pytest.approx(factor * 0.018, rel=0.1)


def test_sizes_that_are_not_met_any_more_are_not_forgotten_soon():
    cost = StageCost()
    for rows in (1, 32):
        for _ in range(300):
            cost.observe(decode(rows), 0.02 + 0.001 * rows)
    for rows in (1, 32):
        assert cost.decode_s(rows, rows * 200) == pytest.approx(0.02 + 0.001 * rows, rel=0.1)


@given(
    st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 1e6), st.floats(0, 100)), min_size=1, max_size=60),
)
def test_parts_are_never_negative_nor_endless(observations):
    fit = CostFit(3)
    for size, context, cost in observations:
        fit.observe(size, (1.0, size, context), cost, cost)
    assert all(part >= 0 and math.isfinite(part) for part in fit.parts)


def test_what_prefill_adds_beside_decodes_is_learnt_apart_from_prefill_alone():
    cost = StageCost()
    for tokens in (64, 128, 256):
        for _ in range(8):
            cost.observe(chunk(tokens), 0.01 + 0.001 * tokens)
            cost.observe(decode(4), 0.02)
    assert cost.added_token_s(0) == pytest.approx(0.001, rel=0.1), "a first guess"
    for number in range(20):
        cost.observe(chunk(20, start=20 * number, rows=4), 0.02 + 0.003 * 20)
    assert cost.added_token_s(0) == pytest.approx(0.003, rel=0.1)


def test_shape_tells_decodes_from_chunks():
    class Row:
        def __init__(self, start, num_tokens):
            self.start, self.num_tokens = start, num_tokens

    shape = StepShape.of([Row(9, 1), Row(0, 1), Row(4, 3)])
    assert shape == (2, 11, 3, 5 + 6 + 7)


# ---- what is left out


@pytest.mark.parametrize(
    ("timings", "round_trip_s"),
    [
        ([], 1.0),
        ([StageSeconds(0.0, 0.01)], 1.0),
        ([StageSeconds(0.0, 0.01)] * 3, 1.0),
        ([StageSeconds(0.0, math.nan), StageSeconds(0.0, 0.01)], 1.0),
        ([StageSeconds(0.0, math.inf), StageSeconds(0.0, 0.01)], 1.0),
        ([StageSeconds(-1.0, 0.01), StageSeconds(0.0, 0.01)], 1.0),
        ([StageSeconds(0.0, 0.01), StageSeconds(0.0, 0.01)], math.nan),
    ],
)
def test_figures_that_cannot_be_change_nothing(timings, round_trip_s):
    pacing = Pacing(2)
    for rows in (1, 2, 4, 8) * 10:
        pacing.observe(decode(rows), timings, round_trip_s)
        pacing.observe(chunk(100), timings, round_trip_s)
    assert pacing.pace(8) == Pace(2)
    assert pacing.pace(8, Prompts(1, 1000)) == pacing.pace(0, Prompts(1, 1000)) == Pace(2, None)


def test_after_a_reset_nothing_is_known():
    pacing = taught([stage_cost(0.01, 0.001)] * 2, hops_s=0.1)
    assert pacing.pace(32).num_lanes > 2
    pacing.reset()
    assert pacing.pace(32, Prompts(1, 1000)) == Pace(2, None)
    assert pacing.expected_s(decode(4)) is None


def test_hops_are_what_no_stage_computed_or_queued():
    pacing = Pacing(2)
    for number in range(40):
        late_s = 5.0 if number % 10 == 0 else 0.0
        pacing.observe(decode(4), [StageSeconds(0.3, 0.01), StageSeconds(0.0, 0.02)], 0.33 + 0.04 + late_s)
    assert pacing.expected_s(decode(4)) == pytest.approx(0.01 + 0.02 + 0.04)


# ---- lanes


@given(
    costs=st.lists(st.tuples(seconds, seconds), min_size=1, max_size=5),
    hops_s=st.floats(0, 0.2),
    num_decodes=st.integers(1, 200),
    max_lanes=st.integers(1, 16),
)
def test_lanes_stay_in_bounds_and_are_nearly_the_best(costs, hops_s, num_decodes, max_lanes):
    def period_s(lanes):
        sizes = [num_decodes // lanes + (index < num_decodes % lanes) for index in range(lanes)]
        bottleneck_s = max(sum(a + b * size for size in sizes if size) for a, b in costs)
        return max(bottleneck_s, sum(a + b * max(sizes) for a, b in costs) + hops_s)

    pacing = taught([stage_cost(a, b) for a, b in costs], hops_s, chunks=(), max_lanes=max_lanes)
    most = max(max_lanes, len(costs))
    lanes = pacing.pace(num_decodes).num_lanes
    assert 1 <= lanes <= most
    assert period_s(lanes) <= 1.15 * min(period_s(count) for count in range(1, most + 1))


def test_far_machines_get_more_lanes_and_heavy_weights_do_not():
    near, far = 0.001, 0.06
    light = [stage_cost(0.002, 0.002)] * 2
    heavy = [stage_cost(0.06, 0.0001)] * 2
    assert taught(light, near).pace(32).num_lanes == 2
    assert taught(light, far).pace(32).num_lanes >= 4
    assert taught(heavy, far).pace(32).num_lanes <= 3
    assert taught(light, far, max_lanes=3).pace(32).num_lanes == 3


def test_lanes_that_the_settings_fix_stay():
    pacing = taught([stage_cost(0.002, 0.002)] * 2, 0.1, lanes=5, max_lanes=2)
    assert {pacing.pace(count).num_lanes for count in (0, 1, 8, 64)} == {5}
    assert pacing.pace(8, Prompts(1, 1000)).num_lanes == pacing.pace(0, Prompts(1, 1000)).num_lanes == 5


def test_noise_does_not_make_lanes_flap():
    pacing = taught([stage_cost(0.004, 0.001)] * 2, 0.02, noise=0.3)
    dice = random.Random(5)
    changes, lanes = 0, pacing.pace(32).num_lanes
    for _ in range(500):
        shape = decode(-(-32 // lanes))
        times = [(0.004 + 0.001 * shape.num_decodes) * dice.uniform(0.8, 1.2) for _ in range(2)]
        pacing.observe(shape, [StageSeconds(0.0, time) for time in times], sum(times) + 0.02 * dice.uniform(0.8, 1.2))
        changes += pacing.pace(32).num_lanes != lanes
        lanes = pacing.pace(32).num_lanes
    assert changes <= 3


def test_where_all_steps_had_as_many_rows_another_lane_is_tried_only_if_stages_idle():
    stages = [stage_cost(0.01, 0.001)] * 2
    assert taught(stages, 0.1, rows=(16,)).pace(32).num_lanes == 3
    assert taught(stages, 0.001, rows=(16,)).pace(32).num_lanes == 2


# ---- prefill


@given(
    costs=st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=4),
    num_decodes=st.integers(1, 64),
    hops_s=st.floats(0, 0.1),
)
def test_a_chunk_beside_decodes_keeps_within_what_it_may_cost_them(costs, num_decodes, hops_s):
    stages = [stage_cost(*cost) for cost in costs]
    pacing = taught(stages, hops_s)
    quiet = pacing.pace(num_decodes).num_lanes
    pace = pacing.pace(num_decodes, Prompts(1, 4096))
    assert pace.chunk_tokens is not None
    assert pace.chunk_tokens >= MIN_SHARED_CHUNK_TOKENS

    def period_s(lanes, tokens):
        rows = -(-num_decodes // lanes)
        times = [a + b * rows + c * tokens for a, b, c in costs]
        return max(lanes * max(times), sum(times) + hops_s)

    if pace.chunk_tokens > MIN_SHARED_CHUNK_TOKENS:
        assert period_s(pace.num_lanes, pace.chunk_tokens) <= 2.2 * period_s(quiet, 0)


def test_many_prompts_beside_few_decodes_get_more():
    pacing = taught([stage_cost(0.02, 0.002, 0.001)] * 2)
    sizes = [pacing.pace(8, Prompts(count, 200 * count)).chunk_tokens for count in (1, 2, 8, 24)]
    assert sizes == sorted(sizes)
    assert sizes[0] <= sizes[1] < sizes[2] < sizes[3]


@given(
    costs=st.lists(st.tuples(seconds, seconds), min_size=2, max_size=4),
    num_tokens=st.integers(1, 8000),
    hops_s=st.floats(0, 0.1),
)
def test_chunks_of_a_lone_prompt_bring_its_token_nearly_as_soon_as_any_others(costs, num_tokens, hops_s):
    pacing = taught([stage_cost(a, 0.0, c) for a, c in costs], hops_s)

    def wait_s(size):
        """Of even chunks through stages that are never short of steps in flight."""
        count = -(-num_tokens // size)
        times = [a + c * (num_tokens / count) for a, c in costs]
        return (count - 1) * max(times) + sum(times)

    pace = pacing.pace(0, Prompts(1, num_tokens))
    assert 1 <= pace.num_lanes <= max(8, len(costs))
    assert pace.chunk_tokens is not None
    assert wait_s(pace.chunk_tokens) <= 1.15 * min(wait_s(-(-num_tokens // count)) for count in range(1, 101))


def test_a_lone_prompt_on_one_stage_goes_in_whole_budgets():
    assert taught([stage_cost(0.01, 0.001)]).pace(0, Prompts(1, 4096)) == Pace(1, None)


# ---- limits


def test_a_shard_that_grants_billions_of_credits_decides_no_loop():
    pacing = taught([stage_cost(0.01, 0.001)] * 2)
    pacing.limit_lanes(2**32 - 1)
    assert pacing.max_lanes <= 64
    assert pacing.pace(200).num_lanes <= 64


@pytest.mark.parametrize("num_decodes", [1, 100, 111, 256])
def test_no_fewer_lanes_than_it_takes_steps_to_hold_all_rows(num_decodes):
    pacing = taught([stage_cost(0.05, 0.0)] * 2)
    pacing.limit_steps(max_rows=110, max_tokens=512)
    assert pacing.pace(num_decodes).num_lanes >= -(-num_decodes // 110)
    assert (pacing.pace(num_decodes, Prompts(3, 9000)).chunk_tokens or 0) <= 512
    assert (pacing.pace(0, Prompts(3, 9000)).chunk_tokens or 0) <= 512


def test_decisions_do_not_pile_up_while_no_step_teaches_anything():
    pacing = Pacing(2)
    for number in range(5000):
        pacing.pace(number)
    assert len(pacing._decided) <= 1024


def test_more_time_at_the_stages_than_the_round_trip_took_is_not_believed():
    pacing = Pacing(2)
    for rows in (1, 8) * 20:
        pacing.observe(decode(rows), [StageSeconds(0.0, 3e30)] * 2, 0.1)
    assert pacing.pace(8) == Pacing(2).pace(8)
    assert not any(stage.decodes.is_known for stage in pacing._stages)


def test_nothing_is_expected_of_a_step_much_larger_than_any_before():
    pacing = Pacing(2)
    for _ in range(20):
        for rows in (1, 4):
            pacing.observe(decode(rows), [StageSeconds(0.0, 0.3)] * 2, 0.7)
        pacing.observe(chunk(3), [StageSeconds(0.0, 0.3)] * 2, 0.7)
    assert pacing.expected_s(decode(4)) is not None
    assert pacing.expected_s(chunk(4)) is not None
    assert pacing.expected_s(chunk(512)) is None
    assert pacing.expected_s(chunk(3, start=30_000)) is None

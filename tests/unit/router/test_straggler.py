"""A stage that becomes many times slower is found; noise, larger steps and slow beginnings are not taken for it.

Whether a step takes half a millisecond or half a second makes no difference to either.
"""

from __future__ import annotations

import random

import pytest

from stagecoach_router.engine.straggler import SLICES_PER_WINDOW, STEPS_BETWEEN_REFERENCES, StragglerDetector
from stagecoach_router.scheduling.cost_model import StepShape
from stagecoach_router.scheduling.pacing import Pacing, StageSeconds

WINDOW_S = 2.5
# What a stage computes for one row, in step times; the rest is what it computes for each row more.
FIRST_STAGE, SECOND_STAGE = 1.0, 0.6
ROW = 0.05
# From a GPU's step to a slow CPU's.
STEP_TIMES_S = [0.0005, 0.001, 0.005, 0.02, 0.1, 0.5]
# Another process has the core for so long.
TURN_S = (0.001, 0.012)


class Noise:
    """What other processes do to one stage: takes the part `load` of its core from it, a turn at a time."""

    def __init__(self, seed: int, load: float = 0.02) -> None:
        self.dice = random.Random(seed)
        self.load = load

    def stretched(self, compute_s: float) -> float:
        """How long a step takes that computes for so long."""
        mean_turn_s = sum(TURN_S) / 2
        num_turns = compute_s * self.load / (1.0 - self.load) / mean_turn_s
        whole, rest = divmod(num_turns, 1.0)
        count = int(whole) + (self.dice.random() < rest)
        return compute_s * self.dice.uniform(0.9, 1.3) + sum(self.dice.uniform(*TURN_S) for _ in range(count))


class Scene:
    """Steps one after the other through two stages."""

    def __init__(self, step_s: float = 0.01, seed: int = 0) -> None:
        self.step_s = step_s
        self.pacing = Pacing(2)
        self.straggler = StragglerDetector(self.pacing, WINDOW_S)
        self.factors = [1.0, 1.0]
        self.noise = [Noise(seed), Noise(seed + 1)]
        self.now_s = 0.0
        self.dice = random.Random(seed + 2)

    def step(self, num_rows: int = 1, context: int = 100, stall_s: float = 0.0) -> int | None:
        """One step, in which the second stage stands still for `stall_s`. Returns the stage that is found slow."""
        shape = StepShape(num_decodes=num_rows, decode_context=context * num_rows)
        seconds = [
            noise.stretched(factor * self.step_s * (fixed + ROW * num_rows))
            for factor, noise, fixed in zip(self.factors, self.noise, (FIRST_STAGE, SECOND_STAGE), strict=True)
        ]
        seconds[1] += stall_s
        round_trip_s = 1.05 * sum(seconds)
        self.now_s += round_trip_s
        stages = [StageSeconds(0.0, compute_s) for compute_s in seconds]
        self.pacing.observe(shape, stages, round_trip_s)
        return self.straggler.observe(shape, stages, round_trip_s, self.now_s)

    def run(self, seconds: float, *, max_rows: int = 4) -> int | None:
        """Steps for so long, at the longest until a stage is found to be slow."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            slow = self.step(self.dice.randint(1, max_rows))
            if slow is not None:
                return slow
        return None

    def learn(self) -> Scene:
        """Until there is something to compare with."""
        assert self.run(max(2.2 * STEPS_BETWEEN_REFERENCES * self.step_s * 2, 2 * WINDOW_S)) is None
        return self


def detection_limit_s(scene: Scene, slowdown: float) -> float:
    """In which a stage that became so much slower has to be found: two windows, however short the steps."""
    longest_step_s = scene.step_s * 1.3 * (slowdown + 1.0) * 1.2
    return max(2 * WINDOW_S, (SLICES_PER_WINDOW + 1) * longest_step_s) + 0.5


@pytest.mark.parametrize("step_s", STEP_TIMES_S)
@pytest.mark.parametrize("slowdown", [10.0, 40.0])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_becomes_ten_times_slower_is_found_however_short_its_steps(step_s, slowdown, stage):
    scene = Scene(step_s, seed=stage).learn()
    scene.factors[stage] = slowdown
    began_s = scene.now_s
    assert scene.run(10 * detection_limit_s(scene, slowdown)) == stage
    assert scene.now_s - began_s <= detection_limit_s(scene, slowdown)


@pytest.mark.parametrize("step_s", STEP_TIMES_S)
@pytest.mark.parametrize("load", [0.2, 0.4])
def test_it_is_found_among_noise_that_was_always_there(step_s, load):
    scene = Scene(step_s)
    scene.noise = [Noise(1, load), Noise(2, load)]
    scene.learn()
    scene.factors[1] = 10.0
    began_s = scene.now_s
    assert scene.run(200.0) == 1
    assert scene.now_s - began_s <= detection_limit_s(scene, 10.0 / (1.0 - load))


@pytest.mark.parametrize("step_s", STEP_TIMES_S)
@pytest.mark.parametrize("seed", [0, 1])
def test_noise_is_not_a_slow_stage(step_s, seed):
    """Bursts in which neighbours take most of the core, stalls, pauses, cold caches, other batches, longer contexts."""
    scene = Scene(step_s, seed).learn()
    dice = random.Random(seed)
    context = 100.0
    for _ in range(10 if step_s < 0.002 else 20):
        scene.noise[1].load = dice.choice([0.02, 0.02, 0.3, 0.5, 0.7])
        rows = dice.randint(1, 8)
        scene.now_s += dice.choice([0.0, 0.0, 1.0, 60.0])
        until_s = scene.now_s + dice.uniform(0.2, 1.5)
        assert scene.step(rows, int(context), stall_s=dice.choice([0.0, 0.0, 0.0, 8 * step_s, 1.5])) is None
        while scene.now_s < until_s:
            context += 0.2
            assert scene.step(rows, int(context)) is None


def test_a_neighbour_on_the_core_of_short_steps_is_not_a_slow_stage():
    scene = Scene(0.0005).learn()
    scene.noise[1].load = 0.5
    assert scene.run(20.0) is None


@pytest.mark.parametrize("step_s", STEP_TIMES_S)
def test_three_times_slower_is_what_neighbours_do(step_s):
    scene = Scene(step_s).learn()
    scene.factors = [3.0, 3.0]
    assert scene.run(max(10.0, 100 * step_s)) is None


def test_a_stage_that_stands_still_for_most_of_the_time_is_slow_though_most_steps_are_not():
    scene = Scene(0.001).learn()
    for number in range(5000):
        if scene.step(stall_s=0.09 if number % 9 == 0 else 0.0) is not None:
            break
    else:
        pytest.fail("not found")
    assert number >= SLICES_PER_WINDOW


def test_larger_steps_are_not_taken_for_slow_ones():
    assert Scene().learn().run(60.0, max_rows=256) is None


def test_a_stage_that_looked_slow_is_still_watched_when_the_batches_have_grown_since():
    scene = Scene().learn()
    assert scene.step(stall_s=5.0) is None  # the last slice that can be compared is a slow one
    for _ in range(4 * STEPS_BETWEEN_REFERENCES):
        assert scene.step(64) is None
    scene.factors[1] = 10.0
    assert any(scene.step(64) == 1 for _ in range(1000))


@pytest.mark.parametrize("step_s", [0.0005, 0.02])
def test_a_lone_stream_after_large_batches_of_which_alone_the_cost_is_known_is_not_slow(step_s):
    scene = Scene(step_s)
    for _ in range(3 * STEPS_BETWEEN_REFERENCES):
        assert scene.step(64, context=30) is None
    for number in range(1000):
        assert scene.step(1, context=30 + 2 * number) is None


@pytest.mark.parametrize("step_s", [0.0005, 0.02])
def test_a_short_context_after_long_ones_is_not_slow(step_s):
    scene = Scene(step_s)
    for number in range(3 * STEPS_BETWEEN_REFERENCES):
        assert scene.step(1, context=2000 + number // 4) is None
    for number in range(1000):
        assert scene.step(1, context=1 + number) is None


def test_one_very_slow_step_says_nothing():
    scene = Scene().learn()
    for _ in range(20):
        scene.factors[1] = 60.0
        assert scene.run(0.001) is None
        scene.factors[1] = 1.0
        assert scene.run(WINDOW_S) is None


def test_what_was_always_slow_is_not_slow():
    scene = Scene()
    scene.factors = [10.0, 1.0]
    assert scene.run(120.0) is None


def test_a_pause_does_not_count_as_a_window():
    scene = Scene().learn()
    scene.now_s += 600.0
    scene.factors[0] = 60.0
    assert scene.run(0.001) is None


def test_the_first_step_after_each_pause_may_take_long():
    scene = Scene(0.0005).learn()
    for _ in range(50):
        scene.now_s += 5.0
        assert scene.step(stall_s=0.05) is None


@pytest.mark.parametrize("stall_s", [0.5, 2.3, 4.0])
@pytest.mark.parametrize("num_steps_before", [0, 3, 20])
def test_one_stall_is_no_slow_stage_however_long(stall_s, num_steps_before):
    scene = Scene().learn()
    for number in range(400):
        assert scene.step(stall_s=stall_s if number == num_steps_before else 0.0) is None


def lone_stream(num_steps, *, position_s, slow_from):
    """The step at which a stage is found slow, of one stream whose steps attend to one position more each time."""
    pacing = Pacing(2)
    straggler = StragglerDetector(pacing, WINDOW_S)
    now_s = 0.0
    for step in range(1, num_steps):
        shape = StepShape(num_decodes=1, decode_context=step)
        fixed_s = 0.012 if position_s == 0.0 else 0.0
        seconds = (fixed_s + step * position_s) * (10.0 if step >= slow_from else 1.0)
        stages = [StageSeconds(0.0, seconds), StageSeconds(0.0, 0.012)]
        took_s = seconds + 0.013
        now_s += took_s
        pacing.observe(shape, stages, took_s)
        if straggler.observe(shape, stages, took_s, now_s) is not None:
            return step
    return None


@pytest.mark.parametrize("slow_from", [530, 600, 800, 1100])
def test_a_stage_that_slows_down_under_a_lone_stream_is_found(slow_from):
    found = lone_stream(slow_from + 100, position_s=0.0, slow_from=slow_from)
    assert found is not None
    assert found >= slow_from


@pytest.mark.parametrize("position_s", [0.000003, 0.0003])
def test_a_lone_stream_whose_context_is_all_it_costs_is_not_slow(position_s):
    assert lone_stream(3000, position_s=position_s, slow_from=10_000) is None


def test_the_first_step_of_each_size_may_take_long():
    """A GPU records a graph for every size of step when it first meets one: sizes that come one after the other do."""
    scene = Scene(step_s=0.01)
    while scene.now_s < 4 * WINDOW_S + 2.2 * STEPS_BETWEEN_REFERENCES * scene.step_s * 2:
        assert scene.step(scene.dice.choice([1, 16])) is None
    for num_rows in range(2, 16):
        assert scene.step(num_rows, stall_s=0.35) is None
        for _ in range(4):
            assert scene.step(num_rows) is None

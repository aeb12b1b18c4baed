"""A stage that becomes many times slower is found; noise, larger steps and slow beginnings are not taken for it."""

from __future__ import annotations

import random

import pytest

from stagecoach_router.engine.straggler import STEPS_BETWEEN_REFERENCES, StragglerDetector
from stagecoach_router.scheduling.cost_model import StepShape
from stagecoach_router.scheduling.pacing import Pacing, StageSeconds

WINDOW_S = 2.5
FIXED_S = (0.010, 0.006)
ROW_S = 0.0005


class Scene:
    """Steps one after the other through two stages."""

    def __init__(self) -> None:
        self.pacing = Pacing(2)
        self.straggler = StragglerDetector(self.pacing, WINDOW_S)
        self.factors = [1.0, 1.0]
        self.now_s = 0.0
        self.dice = random.Random(0)

    def run(self, seconds: float, *, num_rows: int = 4) -> int | None:
        """Steps for so long, at the longest until a stage is found to be slow."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            rows = self.dice.randint(1, num_rows)
            shape = StepShape(num_decodes=rows, decode_context=100 * rows)
            stages = [
                StageSeconds(0.0, factor * (fixed_s + rows * ROW_S) * self.dice.uniform(0.9, 1.3))
                for factor, fixed_s in zip(self.factors, FIXED_S, strict=True)
            ]
            took_s = sum(stage.compute_s for stage in stages) + 0.001
            self.now_s += took_s
            self.pacing.observe(shape, stages, took_s)
            slow = self.straggler.observe(shape, stages, self.now_s)
            if slow is not None:
                return slow
        return None


@pytest.fixture
def measured() -> Scene:
    scene = Scene()
    assert scene.run(3 * STEPS_BETWEEN_REFERENCES * 0.025) is None
    return scene


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_becomes_ten_times_slower_is_found_within_two_windows(measured, stage):
    measured.factors[stage] = 10.0
    began_s = measured.now_s
    assert measured.run(60.0) == stage
    assert measured.now_s - began_s <= 2 * WINDOW_S + 0.5


def test_three_times_slower_is_what_neighbours_do(measured):
    measured.factors = [3.0, 3.0]
    assert measured.run(60.0) is None


def test_larger_steps_are_not_taken_for_slow_ones(measured):
    assert measured.run(120.0, num_rows=256) is None


def test_steps_of_a_millisecond_may_take_ten():
    scene = Scene()
    scene.factors = [0.1, 0.1]
    assert scene.run(3 * STEPS_BETWEEN_REFERENCES * 0.0025) is None
    scene.factors = [1.0, 1.0]
    assert scene.run(60.0) is None


def test_one_very_slow_step_says_nothing(measured):
    for _ in range(20):
        measured.factors[1] = 60.0
        assert measured.run(0.001) is None
        measured.factors[1] = 1.0
        assert measured.run(WINDOW_S) is None


def test_what_was_always_slow_is_not_slow():
    scene = Scene()
    scene.factors = [10.0, 1.0]
    assert scene.run(120.0) is None


def test_after_the_pipeline_was_lost_nothing_is_compared_with_what_was(measured):
    measured.straggler.forget()
    measured.pacing.reset()
    measured.factors[0] = 10.0
    assert measured.run(120.0) is None


def test_a_pause_does_not_count_as_a_window(measured):
    measured.now_s += 600.0
    measured.factors[0] = 60.0
    assert measured.run(0.001) is None


@pytest.mark.parametrize("stall_s", [0.5, 2.3, 4.0])
@pytest.mark.parametrize("num_steps_before", [0, 3, 20])
def test_one_stall_is_no_slow_stage_however_long(measured, stall_s, num_steps_before):
    measured.now_s += 10 * WINDOW_S  # a window begins with the next step
    shape = StepShape(num_decodes=4, decode_context=400)
    for number in range(200):
        compute_s = stall_s if number == num_steps_before else FIXED_S[0] + 4 * ROW_S
        measured.now_s += compute_s + FIXED_S[1]
        stages = [StageSeconds(0.0, compute_s), StageSeconds(0.0, FIXED_S[1])]
        assert measured.straggler.observe(shape, stages, measured.now_s) is None


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
        if straggler.observe(shape, stages, now_s) is not None:
            return step
    return None


@pytest.mark.parametrize("slow_from", [530, 600, 800, 1100])
def test_a_stage_that_slows_down_under_a_lone_stream_is_found(slow_from):
    found = lone_stream(slow_from + 100, position_s=0.0, slow_from=slow_from)
    assert found is not None
    assert found >= slow_from


def test_a_lone_stream_whose_context_is_all_it_costs_is_not_slow():
    assert lone_stream(3000, position_s=0.0003, slow_from=10_000) is None

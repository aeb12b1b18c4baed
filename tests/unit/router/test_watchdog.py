"""A pipeline is given up for a stage that does not answer and for a step that does not get on, and for nothing else."""

from __future__ import annotations

import pytest

from stagecoach_router.metrics.load_report import LoadReport, StageCounters
from stagecoach_router.pipelines.watchdog import MAX_SLOWDOWN, FaultLimits, Watchdog

STAGES = ("a:1", "b:2")
LIMITS = FaultLimits(fault_timeout_s=5.0, step_timeout_s=60.0)


class Scene:
    """A watchdog, and stages that answer unless they are silent and compute if they are busy.

    `busy_for_others`: with steps of another router, of which they finish one in each interval unless they are `stuck`.
    `queued`: where a step of ours waits.
    """

    def __init__(self, limits: FaultLimits = LIMITS) -> None:
        self.dog = Watchdog(STAGES, limits)
        self.now_s = 1000.0
        self.number = 0
        self.silent: set[str] = set()
        self.busy: set[str] = set()
        self.busy_for_others: set[str] = set()
        self.stuck: set[str] = set()
        self.queued: set[str] = set()
        self.others_compute_s = dict.fromkeys(STAGES, 0.0)
        self.others_num_steps = dict.fromkeys(STAGES, 0)
        self.compute_s = dict.fromkeys(STAGES, 0.0)
        self.num_steps = dict.fromkeys(STAGES, 0)

    def until_given_up(self, longest_s: float) -> tuple[float, str] | None:
        """How long it took, and why; None where it was not for `longest_s`."""
        began_s = self.now_s
        while self.now_s - began_s <= longest_s:
            self.number += 1
            finding = self.dog.look(self.now_s, self.number)
            if finding is not None:
                self.named = finding.address
                return self.now_s - began_s, finding.reason
            for address in STAGES:
                if address in self.busy:
                    self.compute_s[address] += self.dog.interval_s
                if address in self.busy_for_others:
                    self.others_compute_s[address] += self.dog.interval_s
                    self.others_num_steps[address] += address not in self.stuck
                if address not in self.silent:
                    self.answer(address, self.number)
            self.now_s += self.dog.interval_s
        return None

    def answer(self, address: str, number: int) -> None:
        report = LoadReport(
            StageCounters(
                num_steps=self.num_steps[address] + self.others_num_steps[address],
                compute_s=self.compute_s[address] + self.others_compute_s[address],
            ),
            number=number,
            lease_num_steps=self.num_steps[address],
            lease_compute_s=self.compute_s[address],
            lease_queue_depth=address in self.queued,
        )
        self.dog.answered(address, report)


def test_an_idle_pipeline_whose_stages_answer_is_left_alone():
    assert Scene().until_given_up(3600.0) is None


@pytest.mark.parametrize("address", STAGES)
def test_a_stage_that_stops_answering_is_found_within_the_timeout(address):
    scene = Scene()
    scene.until_given_up(20.0)
    scene.silent.add(address)
    found = scene.until_given_up(60.0)
    assert found is not None
    assert found[0] <= LIMITS.fault_timeout_s
    assert found[0] > LIMITS.fault_timeout_s / 2
    assert address in found[1]
    assert scene.named == address


def test_reports_that_come_unasked_are_no_answer():
    """They would come also where nothing gets through to the stage."""
    scene = Scene()
    scene.until_given_up(1.0)
    scene.silent.add("b:2")
    for _ in range(8):
        scene.answer("b:2", 0)
        if scene.until_given_up(1.0) is not None:
            return
    pytest.fail("it was not found")


def test_a_late_answer_is_one():
    scene = Scene()
    scene.until_given_up(1.0)
    for _ in range(20):
        scene.silent.add("b:2")
        assert scene.until_given_up(2.5) is None
        scene.silent.clear()
        scene.answer("b:2", scene.number)


def test_a_router_that_stood_still_itself_gives_nothing_up():
    scene = Scene()
    scene.until_given_up(1.0)
    scene.silent.update(STAGES)  # their answers wait to be read
    assert scene.until_given_up(0.5) is None
    scene.now_s += 600.0
    assert scene.until_given_up(0.5) is None


def test_a_step_of_unknown_length_may_take_long_as_long_as_a_stage_computes():
    scene = Scene()
    scene.until_given_up(1.0)
    scene.dog.sent(None)
    scene.busy.add("b:2")
    assert scene.until_given_up(0.9 * LIMITS.step_timeout_s) is None
    found = scene.until_given_up(LIMITS.step_timeout_s)
    assert found is not None
    assert "has computed a step for" in found[1]


def test_each_stage_that_finishes_begins_the_step_timeout_anew():
    scene = Scene()
    scene.until_given_up(1.0)
    scene.dog.sent(None)
    scene.busy.add("a:1")
    assert scene.until_given_up(0.9 * LIMITS.step_timeout_s) is None
    scene.num_steps["a:1"] += 1
    scene.busy = {"b:2"}
    assert scene.until_given_up(0.9 * LIMITS.step_timeout_s) is None


@pytest.mark.parametrize("expected_s", [None, 0.02])
def test_a_step_that_got_lost_between_the_stages_is_found_within_the_timeout(expected_s):
    scene = Scene()
    scene.until_given_up(1.0)
    scene.dog.sent(expected_s)
    found = scene.until_given_up(60.0)
    assert found is not None
    assert found[0] <= LIMITS.fault_timeout_s


def test_a_stage_that_never_finishes_a_step_of_known_length_is_found_soon():
    scene = Scene()
    scene.until_given_up(1.0)
    scene.dog.sent(0.05)
    scene.busy.add("a:1")
    found = scene.until_given_up(60.0)
    assert found is not None
    assert found[0] <= LIMITS.fault_timeout_s
    assert "expected to take 0.05 s" in found[1]


def test_a_long_step_that_is_known_to_be_long_gets_its_time():
    scene = Scene()
    scene.until_given_up(1.0)
    scene.dog.sent(4.0)
    scene.busy.add("a:1")
    assert scene.until_given_up(MAX_SLOWDOWN * 4.0) is None
    assert scene.until_given_up(LIMITS.fault_timeout_s) is not None


def test_the_next_steps_time_begins_when_the_one_before_is_back():
    scene = Scene()
    scene.until_given_up(1.0)
    for _ in range(2):
        scene.dog.sent(0.05)
    for _ in range(20):
        assert scene.until_given_up(2.5) is None
        scene.dog.returned()
        scene.dog.sent(0.05)


def test_when_all_steps_are_back_none_is_overdue():
    scene = Scene()
    scene.until_given_up(1.0)
    scene.dog.sent(0.05)
    scene.dog.returned()
    assert scene.until_given_up(600.0) is None


@pytest.mark.parametrize("expected_s", [None, 0.02])
def test_the_steps_of_another_router_do_not_hide_one_that_got_lost(expected_s):
    scene = Scene()
    scene.busy_for_others.update(STAGES)
    scene.until_given_up(20.0)
    scene.dog.sent(expected_s)
    found = scene.until_given_up(60.0)
    assert found is not None
    assert found[0] <= LIMITS.fault_timeout_s
    assert "no stage has computed" in found[1]
    assert scene.named is None


@pytest.mark.parametrize("address", STAGES)
@pytest.mark.parametrize("expected_s", [None, 0.02])
def test_a_step_that_waits_behind_another_routers_long_one_is_not_overdue(expected_s, address):
    scene = Scene()
    assert scene.until_given_up(3600.0) is None  # nobody computes anything for long before
    scene.busy_for_others.add(address)
    scene.stuck.add(address)
    scene.queued.add(address)
    scene.dog.sent(expected_s)
    assert scene.until_given_up(0.9 * LIMITS.step_timeout_s) is None
    scene.busy_for_others.clear()
    scene.queued.clear()
    scene.dog.returned()
    assert scene.until_given_up(60.0) is None


def test_a_step_may_wait_behind_any_number_of_others_as_long_as_they_get_done():
    scene = Scene()
    scene.busy_for_others.add("b:2")
    scene.queued.add("b:2")
    scene.dog.sent(0.02)
    assert scene.until_given_up(10 * LIMITS.step_timeout_s) is None


def test_a_step_that_waits_behind_one_that_never_ends_is_found_after_the_step_timeout():
    scene = Scene()
    scene.until_given_up(1.0)
    scene.busy_for_others.add("b:2")
    scene.stuck.add("b:2")
    scene.queued.add("b:2")
    scene.dog.sent(0.02)
    found = scene.until_given_up(10 * LIMITS.step_timeout_s)
    assert found is not None
    assert LIMITS.step_timeout_s <= found[0] <= LIMITS.step_timeout_s + LIMITS.fault_timeout_s


def test_our_own_step_that_hangs_is_found_although_others_and_more_of_ours_wait_behind_it():
    scene = Scene()
    scene.busy_for_others.update(STAGES)
    scene.until_given_up(20.0)
    scene.busy_for_others.clear()
    scene.busy.add("a:1")
    scene.queued.add("a:1")
    scene.dog.sent(0.05)
    scene.dog.sent(0.05)
    found = scene.until_given_up(60.0)
    assert found is not None
    assert found[0] <= LIMITS.fault_timeout_s


def test_once_the_others_are_through_our_steps_time_counts_again():
    scene = Scene()
    scene.busy_for_others.add("b:2")
    scene.queued.add("b:2")
    scene.dog.sent(0.02)
    assert scene.until_given_up(30.0) is None
    scene.queued.clear()
    scene.busy_for_others.clear()
    found = scene.until_given_up(60.0)
    assert found is not None
    assert found[0] <= LIMITS.fault_timeout_s

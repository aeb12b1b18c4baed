"""A few hundred hostile inputs for each decoder; `make nightly` gives them a million."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest

from stagecoach.errors import InternalError, InvalidArgument
from tests.fuzz import __main__ as command
from tests.fuzz.engine import Find, Target, fuzz
from tests.fuzz.mutation import mutate
from tests.fuzz.targets import TARGETS, make_target

SEED = 20_261
NUM_INPUTS_PER_SHARE = 30


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_are_refused_in_time_and_in_bounds(name: str, tmp_path: Path) -> None:
    target = make_target(name, tmp_path)
    report = fuzz(target, SEED, range(NUM_INPUTS_PER_SHARE * target.share))
    assert report.num_inputs == NUM_INPUTS_PER_SHARE * target.share
    # Mutations that leave nothing alone would only ever test the first check.
    assert 0 < report.num_accepted < report.num_inputs


@pytest.mark.parametrize("name", TARGETS)
def test_the_inputs_that_hostile_ones_are_made_of_are_accepted(name: str, tmp_path: Path) -> None:
    target = make_target(name, tmp_path)
    refused = 0
    for data in target.corpus:
        try:
            target.check(data)
        except Exception:
            refused += 1
    assert refused < len(target.corpus)


def _target(check, **limits) -> Target:
    return Target("made_up", [b"some bytes, and some more"], check, **limits)


def _raise(error: Exception):
    def check(data: bytes) -> None:
        raise error

    return check


def _spin(data: bytes) -> None:
    sum(range(3_000_000))


@pytest.mark.parametrize(
    ("check", "limits", "reason"),
    [
        (_raise(IndexError("list index out of range")), {}, "IndexError"),
        (_raise(InternalError("a bug of ours")), {}, "InternalError"),
        (lambda data: bytearray(4 << 20), {"max_allocated_bytes": 1 << 20}, "allocated"),
        (_spin, {"max_s": 0.005}, "took"),
    ],
)
def test_what_is_not_taken_well_is_found_and_can_be_seen_again(check, limits, reason: str) -> None:
    target = _target(check, **limits)
    with pytest.raises(Find, match=reason) as caught:
        fuzz(target, 5, range(10))
    assert "--target made_up --seed 5 --only 0" in str(caught.value)


def test_a_typed_refusal_is_no_find() -> None:
    report = fuzz(_target(_raise(InvalidArgument("no"))), 5, range(20))
    assert (report.num_inputs, report.num_accepted) == (20, 0)


def test_an_input_follows_from_target_seed_and_number() -> None:
    target = _target(lambda data: None)
    inputs = [target.input(1, index) for index in range(200)]
    assert inputs == [target.input(1, index) for index in range(200)]
    assert inputs != [target.input(2, index) for index in range(200)]
    assert len(set(inputs)) > 150
    assert max(map(len, inputs)) <= target.max_input_bytes


def test_inputs_are_cut_to_the_limit() -> None:
    rng = random.Random(1)
    assert all(len(mutate(rng, [b"0123456789"], [b"word"], 12)) <= 12 for _ in range(500))


def test_the_command_reports_and_runs_one_input_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--target", "text", "--inputs", "50", "--seed", "3"]) == 0
    assert "text" in capsys.readouterr().out
    assert command.main(["--target", "text", "--seed", "3", "--only", "7"]) == 0
    assert "1 inputs, 0 targets with a find" in capsys.readouterr().out

"""What the demo counts as a fault, and in which portions it shows answers that come at the same time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_cli.demo import EXPECTED, QUESTION, Answer, find_faults, finished_lines
from stagecoach_local import ProcessExit

RIGHT = Answer(QUESTION, 0.0, text=f"It is {EXPECTED}.")
CLEAN = (ProcessExit("shard 0:4", 0, killed=False), ProcessExit("router", 0, killed=False))


def test_a_right_answer_and_a_clean_stop_have_no_faults() -> None:
    assert find_faults([RIGHT], CLEAN) == []


def test_a_wrong_answer_is_a_fault() -> None:
    (fault,) = find_faults([Answer(QUESTION, 0.0, text="It is Lyon."), RIGHT], CLEAN)
    assert "Paris" in fault
    assert "It is Lyon." in fault


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (ProcessExit("router", 3, killed=False), "router ended with status 3"),
        (ProcessExit("router", -11, killed=False), "router was ended by SIGSEGV"),
        (ProcessExit("router", -9, killed=True), "router did not stop in time and was killed"),
        (ProcessExit("router", 0, killed=True), "router did not stop in time and was killed"),
    ],
)
def test_a_process_that_did_not_stop_cleanly_is_a_fault(ended: ProcessExit, fault: str) -> None:
    assert find_faults([RIGHT], [*CLEAN, ended]) == [fault]


@pytest.mark.parametrize(
    ("text", "last", "lines", "rest"),
    [
        ("The sky is", False, [], "The sky is"),
        ("It is blue. Beca", False, ["It is blue."], "Beca"),
        ("It is blue.", False, [], "It is blue."),
        ("1. The Danube", False, [], "1. The Danube"),
        ("1. The Danube\n2. The", False, ["1. The Danube"], "2. The"),
        ("One! Two? Thr", False, ["One! Two?"], "Thr"),
        (" a\n\n b", True, ["a", "b"], ""),
        ("", True, [], ""),
    ],
)
def test_answers_come_in_whole_sentences_and_lines(text: str, last: bool, lines: list[str], rest: str) -> None:
    found, length = finished_lines(text, last=last)
    assert (found, text[length:]) == (lines, rest)


@given(st.lists(st.text(alphabet="ab1. !\n", max_size=6), min_size=1))
def test_nothing_of_an_answer_is_lost_or_said_twice(chunks: list[str]) -> None:
    text, num_printed, said = "", 0, []
    for index, chunk in enumerate(chunks):
        text += chunk
        lines, length = finished_lines(text[num_printed:], last=index == len(chunks) - 1)
        num_printed += length
        said += lines
    assert "".join("".join(said).split()) == "".join(text.split())

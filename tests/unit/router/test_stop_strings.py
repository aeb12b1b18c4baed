from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stagecoach_router.text.stop_strings import StopStrings

letters = st.text(alphabet="ab🎉", max_size=30)
stops = st.lists(st.text(alphabet="ab🎉", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


def naive(text: str, stop: tuple[str, ...]) -> str | None:
    """What comes before the stop string that is complete first, the longest of several; None where there is none."""
    for end in range(1, len(text) + 1):
        found = [len(string) for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end - max(found)]
    return None


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    searcher = StopStrings(stop)
    text = ""
    for piece in pieces:
        released, stopped = searcher.feed(piece)
        text += released
        if stopped:
            return text, True
    return text + searcher.flush(), False


@given(st.lists(letters, max_size=8), stops)
@example(["aab"], ("ab",))
@example(["a", "b", "a"], ("abab", "ba"))
def test_finds_what_a_search_of_the_whole_text_finds(pieces: list[str], stop: tuple[str, ...]) -> None:
    expected = naive("".join(pieces), stop)
    text, stopped = run(pieces, stop)
    assert stopped == (expected is not None)
    assert text == ("".join(pieces) if expected is None else expected)


@given(letters, stops)
def test_holds_back_only_what_could_begin_a_stop_string(text: str, stop: tuple[str, ...]) -> None:
    searcher = StopStrings(stop)
    released = ""
    for index, character in enumerate(text, start=1):
        more, stopped = searcher.feed(character)
        released += more
        if stopped:
            return
        held = text[len(released) : index]
        longest = max(
            (size for size in range(index + 1) if any(s.startswith(text[index - size : index]) for s in stop)),
            default=0,
        )
        assert len(held) == longest


def test_a_stop_string_across_pieces_does_not_show() -> None:
    searcher = StopStrings(("<end>",))
    assert searcher.feed("so <e") == ("so ", False)
    assert searcher.feed("nd") == ("", False)
    assert searcher.feed("> and more") == ("", True)
    assert searcher.flush() == ""


def test_text_that_did_not_become_a_stop_string_comes_out() -> None:
    searcher = StopStrings(("<end>",))
    assert searcher.feed("a <en") == ("a ", False)
    assert searcher.feed("try") == ("<entry", False)
    assert searcher.feed("<") == ("", False)
    assert searcher.flush() == "<"


def test_after_a_stop_nothing_comes_out() -> None:
    searcher = StopStrings(("x",))
    assert searcher.feed("axb") == ("a", True)
    assert searcher.feed("more") == ("", True)
    assert searcher.flush() == ""


def test_without_stop_strings_text_passes_through() -> None:
    searcher = StopStrings(())
    assert searcher.feed("text") == ("text", False)
    assert searcher.flush() == ""


@pytest.mark.parametrize("stop", [("a" * 256, "b"), ("a" * 255 + "c",)])
def test_a_long_near_miss_takes_linear_work(stop: tuple[str, ...]) -> None:
    searcher = StopStrings(stop)
    released = "".join(searcher.feed("a" * 255 + "d")[0] for _ in range(200))
    assert released == ("a" * 255 + "d") * 200

"""A log is a line an event, whatever a peer or a caller has sent that is quoted in it."""

from __future__ import annotations

import io
import logging

import pytest

from stagecoach.process import logs


@pytest.fixture
def log():
    """A logger and what it has written."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(logs.LineFormatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(logs.RepeatFilter())
    logger = logging.Logger("log")
    logger.addHandler(handler)
    return logger, output


def test_what_is_written_as_it_is_and_what_is_made_visible(log):
    logger, output = log
    logger.info("grüße %s", "日本語 🙂")
    logger.info("bad\n12:00:00 ERROR   stagecoach: forged\r\x1b[2J\x9b31m\u202e\x00\ud800 end")
    lines = output.getvalue().splitlines()
    assert lines[0] == "INFO log: grüße 日本語 🙂"
    assert lines[1:] == [
        r"INFO log: bad\n12:00:00 ERROR   stagecoach: forged\r\x1b[2J\x9b31m\u202e\x00\ud800 end",
    ]


def test_six_megabytes_are_a_few_kilobytes(log):
    logger, output = log
    logger.warning("fault: %s", "\x1b" * (6 << 20))
    assert len(output.getvalue()) <= logs.MAX_LENGTH + 100
    assert "(6291463 characters)" in output.getvalue()


def test_a_traceback_is_whole_and_none_of_its_lines_can_be_taken_for_another_event(log):
    logger, output = log
    try:
        raise ValueError("quoted\nERROR log: forged\x1b[2J")
    except ValueError:
        logger.exception("it failed")
    first, *others = output.getvalue().splitlines()
    assert first == "ERROR log: it failed"
    assert others[0] == "    | Traceback (most recent call last):"
    assert others[-1] == r"    | ERROR log: forged\x1b[2J"
    assert all(line.startswith("    | ") for line in others)


def test_a_long_traceback_keeps_its_beginning_and_its_end(log):
    logger, output = log
    try:
        raise ValueError("x" * (1 << 20) + " the end")
    except ValueError:
        logger.exception("it failed")
    text = output.getvalue()
    assert len(text) < logs.MAX_LENGTH
    assert "Traceback" in text
    assert text.endswith(" the end\n")


def test_a_warning_that_is_repeated_is_told_once_in_a_while_with_how_often_it_came(log, monkeypatch):
    """However the wall clock is set meanwhile."""
    logger, output = log
    now_s = 1000.0
    monkeypatch.setattr(logging.time, "time_ns", lambda: int((9e8 - 1000 * now_s) * 1e9), raising=False)
    monkeypatch.setattr(logging.time, "time", lambda: 9e8 - 1000 * now_s)
    handler = logger.handlers[0]
    handler.removeFilter(handler.filters[0])
    handler.addFilter(logs.RepeatFilter(lambda: now_s))
    for _ in range(100):
        logger.warning("pipeline lost: %s", "broken")
        now_s += 0.1
    logger.warning("pipeline lost: another reason")
    logger.info("an event")
    logger.info("an event")
    now_s += logs.REPEAT_S
    logger.warning("pipeline lost: %s", "broken")
    logger.warning("pipeline lost: %s", "broken")
    assert output.getvalue().splitlines() == [
        "WARNING log: pipeline lost: broken",
        "WARNING log: pipeline lost: another reason",
        "INFO log: an event",
        "INFO log: an event",
        "WARNING log: pipeline lost: broken (99 times more in the last 40 s)",
    ]


def test_the_same_words_with_another_traceback_are_other_news(log):
    logger, output = log
    for error in (
        ValueError("one"),
        ValueError("one"),
        ValueError("other"),
        KeyError("one"),
        ValueError("x" * 100_000),
    ):
        logger.warning("it failed", exc_info=error)
    assert output.getvalue().count("WARNING log: it failed") == 4
    [handler] = logger.handlers
    [repeats] = handler.filters
    assert sum(len(part) for key in repeats._seen for part in key) < logs.MAX_LENGTH


def test_no_more_warnings_are_remembered_than_a_few(log):
    logger, _ = log
    [handler] = logger.handlers
    for number in range(10 * logs.MAX_REMEMBERED):
        logger.warning("%d", number)
    [repeats] = handler.filters
    assert len(repeats._seen) == logs.MAX_REMEMBERED

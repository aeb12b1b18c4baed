"""Somebody else's text, so that it can stand in a log line or on a terminal and do nothing there."""

from __future__ import annotations


def visible(text: str, *, keep: str = "") -> str:
    """The text on one line: what cannot be printed is written as Python would, such as \\x1b and \\n.

    `keep`: characters that stay all the same, such as a tab.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode() for each in text
    )


def cut(text: str, max_length: int) -> str:
    """The text, with only its length of what is too much."""
    return text if len(text) <= max_length else f"{text[:max_length]}… ({len(text)} characters)"

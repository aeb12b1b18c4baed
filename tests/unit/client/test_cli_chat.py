"""A conversation in the terminal: what is kept of it, and what stops an answer or ends it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Self

import pytest

from stagecoach.errors import InvalidArgument, OutOfRange, Unavailable
from stagecoach_cli.chat import Conversation, converse
from stagecoach_client.results import Chunk, FinishReason


class FakeStream:
    """Yields what it was given; raises what is an exception."""

    def __init__(self, texts: list[str | BaseException], finish_reason: FinishReason) -> None:
        self._texts = texts
        self._finish_reason = finish_reason
        self.closed = False

    def __iter__(self) -> Iterator[Chunk]:
        for index, text in enumerate(self._texts):
            if isinstance(text, BaseException):
                raise text
            last = index == len(self._texts) - 1
            yield Chunk(0, text, (1,), (), self._finish_reason if last else None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


class FakeClient:
    def __init__(self, *answers: list[str | BaseException], finish_reason: FinishReason = "stop") -> None:
        self._streams = [FakeStream(answer, finish_reason) for answer in answers]
        self.used: list[FakeStream] = []
        self.asked: list[dict[str, Any]] = []

    def generate(self, **options: Any) -> FakeStream:
        self.asked.append(options)
        self.used.append(self._streams.pop(0))
        return self.used[-1]


def roles(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def talk(client: FakeClient, system: str | None = None) -> Conversation:
    return Conversation(client, system, {"seed": 1})  # type: ignore[arg-type]


def test_the_conversation_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient(["Hel", "lo"], ["Bye"])
    conversation = talk(client, "Be brief.")
    conversation.say("hi")
    conversation.say("go")
    assert capsys.readouterr().out == "Hello\nBye\n"
    expected = [("system", "Be brief."), ("user", "hi"), ("assistant", "Hello"), ("user", "go"), ("assistant", "Bye")]
    assert roles(conversation) == expected
    assert [m["content"] for m in client.asked[1]["messages"]] == ["Be brief.", "hi", "Hello", "go"]
    assert client.asked[0]["seed"] == 1


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient(["Hel", KeyboardInterrupt()])
    conversation = talk(client)
    conversation.say("hi")
    assert capsys.readouterr().out == "Hel [stopped]\n"
    assert client.used[0].closed
    assert roles(conversation) == [("user", "hi"), ("assistant", "Hel")]


def test_ctrl_c_before_the_first_word_leaves_no_trace() -> None:
    conversation = talk(FakeClient([KeyboardInterrupt()]))
    conversation.say("hi")
    assert roles(conversation) == []


def test_a_turn_that_failed_leaves_no_trace_and_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(FakeClient(["Hel", Unavailable("gone")]))
    with pytest.raises(Unavailable):
        conversation.say("hi")
    assert roles(conversation) == []
    assert capsys.readouterr().out == "Hel\n"


def test_a_conversation_that_has_outgrown_the_context_can_be_left_for_a_new_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient(["Hello"], [OutOfRange("too long")], ["Again"])
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nmore\n/new\nhi\n"))
    converse(talk(client, "Be brief."))
    shown = capsys.readouterr()
    assert shown.err == "error: too long; /new forgets the conversation and begins another\n"
    assert [[m["content"] for m in asked["messages"]] for asked in client.asked] == [
        ["Be brief.", "hi"],
        ["Be brief.", "hi", "Hello", "more"],
        ["Be brief.", "hi"],
    ]


def test_a_first_message_that_is_too_long_is_not_the_conversations_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    converse(talk(FakeClient([OutOfRange("too long")])))
    assert capsys.readouterr().err == "error: too long\n"


def test_input_that_is_not_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(InvalidArgument, match="standard input is not utf-8"):
        converse(talk(FakeClient()))


def test_an_answer_that_was_cut_off_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    talk(FakeClient(["Hel"], finish_reason="length")).say("hi")
    assert "cut off" in capsys.readouterr().out

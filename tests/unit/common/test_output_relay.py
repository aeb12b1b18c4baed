"""An output that is slow, full or gone costs lines, which are counted, and stops nobody who has something to say."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from stagecoach.process.output_relay import OutputRelay
from stagecoach_cli.up import _Log

TIMEOUT_S = 10.0


class Output:
    """Takes lines as long as it is open, and fails while it is full."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.full = False
        self.tried = threading.Semaphore(0)  # once for each write that failed

    def write(self, line: str) -> None:
        self.entered.set()
        assert self.open.wait(TIMEOUT_S)
        if self.full:
            self.tried.release()
            raise OSError(errno.ENOSPC, "no space left on device")
        self.lines.append(line)


def relay_to(output: Output, max_waiting: int = 1000) -> OutputRelay:
    return OutputRelay(lambda count: output.write(f"{count} dropped"), max_waiting)


def test_lines_are_written_in_order() -> None:
    output = Output()
    relay = relay_to(output)
    for number in range(500):
        relay.put(lambda number=number: output.write(str(number)))  # type: ignore[misc]
    relay.close(TIMEOUT_S)
    assert output.lines == [str(number) for number in range(500)]


def test_who_has_something_to_say_never_waits_and_what_is_left_out_is_counted() -> None:
    output = Output()
    relay = relay_to(output, max_waiting=10)
    output.open.clear()
    relay.put(lambda: output.write("first"))
    assert output.entered.wait(TIMEOUT_S)
    for number in range(100):
        relay.put(lambda number=number: output.write(str(number)))  # type: ignore[misc]
    output.open.set()
    relay.close(TIMEOUT_S)
    assert output.lines == ["first", "90 dropped", *(str(number) for number in range(10))]


def test_an_output_that_fails_is_tried_again_with_the_next_line() -> None:
    output = Output()
    relay = relay_to(output)
    output.full = True
    for number in range(3):
        relay.put(lambda number=number: output.write(str(number)))  # type: ignore[misc]
        assert output.tried.acquire(timeout=TIMEOUT_S)
    output.full = False
    relay.put(lambda: output.write("again"))
    relay.close(TIMEOUT_S)
    assert output.lines == ["3 dropped", "again"]


def test_an_output_that_hangs_does_not_keep_the_process() -> None:
    output = Output()
    relay = relay_to(output)
    output.open.clear()
    relay.put(lambda: output.write("late"))
    assert output.entered.wait(TIMEOUT_S)
    relay.close(timeout_s=0.05)
    assert output.lines == [], "it has waited for the output"
    output.open.set()


def test_what_up_cannot_print_is_neither_kept_nor_printed_later() -> None:
    """With a real console on a pipe that nobody reads for a while, and then on one whose reader has gone."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # full, it fails as a full disk does
    with open(writing, "w", encoding="utf-8") as file:
        log = _Log(Console(file=file, width=80))
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        for number in range(500):
            log.line_of("shard", f"lost {number}")
        log.say("the last one that is lost")
        assert wait_until(lambda: log._relay._waiting.empty())
        drain(reading)
        log.say("heard again")
        log.close()
        text = drain(reading).decode()
        os.close(reading)
        log = _Log(Console(file=file, width=80))
        log.say("nobody is there")
        log.close()
    assert "heard again" in text
    assert "lines could not be written" in text
    assert text.count("lost") <= 2, "what was being written when it got through"


def test_what_a_process_prints_or_is_quoted_with_moves_no_cursor_and_is_not_taken_for_markup(tmp_path: Path) -> None:
    path = tmp_path / "terminal"
    file = path.open("w", encoding="utf-8")
    log = _Log(Console(file=file, width=80, markup=False))
    log.line_of("shard", "a\x1b[2J\x1b]0;title\x07\rb\tc \u202e\x9b31m [bold]d")
    log.say("router died; its last lines:\n  \x1b[31mred")
    log.close()
    file.close()
    assert path.read_text().splitlines() == [
        r"[shard] a\x1b[2J\x1b]0;title\x07\rb     c \u202e\x9b31m [bold]d",
        "router died; its last lines:",
        r"  \x1b[31mred",
    ]


def wait_until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True


def drain(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    read = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(descriptor, 1 << 16):
            read += chunk
    return read

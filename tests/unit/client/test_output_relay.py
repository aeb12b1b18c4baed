"""An output that is slow, full or gone costs lines, which are counted, and stops nobody who has something to say."""

from __future__ import annotations

import errno
import threading

from stagecoach_cli.output_relay import OutputRelay

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
    relay.put(lambda: output.write("never"))
    relay.close(timeout_s=0.05)
    output.open.set()

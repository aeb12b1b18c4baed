"""Supervision, with tiny commands in the place of servers."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from stagecoach.errors import ConfigError
from stagecoach_local.child_process import ChildProcess
from stagecoach_local.process_exit import ProcessDied

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)"


class Lines:
    """Collects a child's output, and lets a test wait for it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.arrived = threading.Event()

    def __call__(self, name: str, line: str) -> None:
        self.seen.append((name, line))
        self.arrived.set()


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def started(lines: Lines) -> Iterator[list[ChildProcess]]:
    children: list[ChildProcess] = []
    yield children
    for child in children:
        child.kill()


def python(code: str, lines: Lines, started: list[ChildProcess]) -> ChildProcess:
    child = ChildProcess("child", [sys.executable, "-c", code], lines)
    child.start()
    started.append(child)
    return child


def test_output_is_passed_on_with_the_name(lines: Lines, started: list[ChildProcess]) -> None:
    child = python("import sys; print('out'); print('err', file=sys.stderr)", lines, started)
    assert child.wait(10)
    assert sorted(lines.seen) == [("child", "err"), ("child", "out")]


def test_a_receiver_that_fails_costs_the_line_and_not_the_child(started: list[ChildProcess]) -> None:
    def fail(name: str, line: str) -> None:
        raise OSError(f"cannot print {line}")

    child = ChildProcess("child", [sys.executable, "-c", "for i in range(100): print(i)\ninput()\n"], fail)
    child.start()
    started.append(child)
    assert child.wait(10)
    ended = child.ended()
    assert ended is not None
    assert child.num_lost_lines > 100
    assert "EOFError" in ended.last_lines[-1]


def test_a_line_without_an_end_does_not_grow_without_bound(lines: Lines, started: list[ChildProcess]) -> None:
    child = python("import sys; sys.stdout.write('x' * 1_000_000)", lines, started)
    assert child.wait(10)
    assert max(len(line) for _, line in lines.seen) <= 1 << 16
    assert "".join(line for _, line in lines.seen) == "x" * 1_000_000


def test_a_death_is_reported_with_the_last_lines(lines: Lines, started: list[ChildProcess]) -> None:
    child = python("print('\\n'.join(map(str, range(50)))); raise SystemExit(3)", lines, started)
    assert child.wait(10)
    with pytest.raises(ProcessDied, match=r"child \(pid \d+\) ended with status 3") as caught:
        child.check()
    assert str(caught.value).endswith("48\n  49")
    assert "\n  29\n" not in str(caught.value)


def test_a_death_by_a_signal_is_named(lines: Lines, started: list[ChildProcess]) -> None:
    child = python(STUBBORN, lines, started)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(10)
    with pytest.raises(ProcessDied, match="SIGKILL"):
        child.check()


def test_a_running_child_passes_the_check(lines: Lines, started: list[ChildProcess]) -> None:
    python("import time; time.sleep(60)", lines, started).check()


def test_a_child_that_ignores_the_request_can_be_killed(lines: Lines, started: list[ChildProcess]) -> None:
    child = python(STUBBORN, lines, started)
    assert lines.arrived.wait(10)
    child.terminate()
    assert not child.wait(0.05)
    child.kill()
    assert child.exit_status == -signal.SIGKILL
    child.kill()  # again is no error
    child.terminate()


def test_output_that_is_not_text_does_no_harm(lines: Lines, started: list[ChildProcess]) -> None:
    child = python("import sys; sys.stdout.buffer.write(b'\\xff\\xfe ok\\n')", lines, started)
    assert child.wait(10)
    assert lines.seen[0][1].endswith(" ok")


def test_a_ctrl_c_in_the_terminal_does_not_reach_it(lines: Lines, started: list[ChildProcess]) -> None:
    child = python(STUBBORN, lines, started)
    assert os.getsid(child.pid) != os.getsid(0)


def test_a_command_that_does_not_exist_is_said_to(lines: Lines) -> None:
    child = ChildProcess("shard", ["/nonexistent/program"], lines)

    def run() -> None:
        child.start()  # fails here, or, where something is put in front of the command, in the child
        child.wait(10)
        child.check()

    with pytest.raises((ProcessDied, ConfigError), match=r"(?s)shard.*No such file"):
        run()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's watch is Linux's")
def test_a_child_dies_with_a_parent_that_was_killed() -> None:
    code = f"""
import sys, time
from stagecoach_local.child_process import ChildProcess
child = ChildProcess("c", [sys.executable, "-c", {STUBBORN!r}], lambda name, line: print(child.pid, flush=True))
child.start()
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child_pid = int(parent.stdout.readline())
        watch = os.pidfd_open(child_pid)
        parent.kill()
        parent.wait()
    try:
        assert select.select([watch], [], [], 10)[0], "the child outlived its parent"
    finally:
        os.close(watch)

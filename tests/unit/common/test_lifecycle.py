"""How a process ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from stagecoach.process import listener

TIMEOUT_S = 20


def run(main: str, prelude: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """A process whose `main(stop)` has this body."""
    lines = [
        "import asyncio, os, signal, sys, threading",
        "from stagecoach.errors import ConfigError",
        "from stagecoach.process import lifecycle, standard_streams",
        "standard_streams.open_closed_streams()",
        "lifecycle.EXIT_TIMEOUT_S = 0.2",
        textwrap.dedent(prelude),
        "async def main(stop):",
        textwrap.indent(textwrap.dedent(main), "    "),
        "sys.exit(lifecycle.run('prog', main))",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": TIMEOUT_S} | options
    return subprocess.run(command, **given)  # type: ignore[call-overload,no-any-return]


HANGS = "asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)"


@pytest.mark.parametrize(
    ("main", "status"),
    [
        (f"{HANGS}", 0),
        (f"{HANGS}; os.kill(os.getpid(), signal.SIGTERM); await stop.wait()", 0),
        (f"{HANGS}; raise ConfigError('listen: no')", 1),
    ],
    ids=["work that ends", "a signal", "an error"],
)
def test_a_thread_that_hangs_keeps_no_process(main: str, status: int) -> None:
    ended = run(main)
    assert ended.returncode == status
    assert ("prog: error: listen: no" in ended.stderr) == bool(status)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("ignored", ["SIGINT", "SIGHUP"])
def test_it_stops_on_every_signal_that_means_stop_but_for_what_nohup_asks_for(number: str, ignored: str) -> None:
    main = f"""
        os.kill(os.getpid(), signal.{number})
        try:
            async with asyncio.timeout(0.5):
                await stop.wait()
        except TimeoutError:
            raise ConfigError("not stopped") from None
    """
    ended = run(main, prelude=f"signal.signal(signal.{ignored}, signal.SIG_IGN)")
    assert ended.returncode == (1 if number == ignored == "SIGHUP" else 0)


def test_a_second_signal_ends_it_at_once() -> None:
    main = """
        os.kill(os.getpid(), signal.SIGINT)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
    """
    assert run(main).returncode == 0


def test_an_error_that_finds_no_room_is_still_a_status() -> None:
    with open("/dev/full", "w") as full:
        assert run("raise ConfigError('no')", stderr=full).returncode == 1


@pytest.mark.parametrize("closed", [[2], [1, 2], [0, 1, 2], [0]])
def test_a_process_runs_without_its_standard_streams(closed: list[int]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    main = "print('out'); print('err', file=sys.stderr); raise ConfigError('no')"
    assert run(main, preexec_fn=close).returncode == 1


async def test_a_server_that_does_not_stop_is_left_to_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck:
        async def stop(self, grace_s: float) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(listener, "STOP_TIMEOUT_S", 0.01)
    stuck: Any = Stuck()
    async with asyncio.timeout(TIMEOUT_S):
        await listener.stop_server(stuck, 0.01)
    assert "has not stopped" in caplog.text

"""A log goes on, whatever has become of where it is written."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stagecoach.process.relayed_log import RelayHandler

TIMEOUT_S = 20


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads, and its reading end."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    yield reading, writing
    os.close(writing)


def logger_to(descriptor: int) -> tuple[logging.Logger, RelayHandler]:
    logger, handler = logging.Logger("test"), RelayHandler(descriptor)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    return logger, handler


def test_lines_are_there_in_order_after_a_flush_and_more_than_one() -> None:
    reading, writing = os.pipe()
    logger, handler = logger_to(writing)
    for number in range(50):
        logger.info("%d: grüße", number)
    handler.flush()
    logger.warning("later")
    handler.flush()
    os.close(writing)
    with open(reading, encoding="utf-8") as log:
        assert log.read().splitlines() == [*(f"INFO {number}: grüße" for number in range(50)), "WARNING later"]


def test_who_logs_does_not_wait_for_a_reader() -> None:
    with full_pipe() as (reading, writing):
        logger, handler = logger_to(writing)
        for number in range(5000):  # would hang
            logger.info("%d", number)
        read: list[bytes] = []

        def read_all() -> None:
            while data := os.read(reading, 1 << 16):
                read.append(data)

        reader = threading.Thread(target=read_all)
        reader.start()
        handler.flush()
    reader.join(TIMEOUT_S)
    lines = b"".join(read).decode().lstrip("x").splitlines()
    written = [line for line in lines if line.startswith("INFO")]
    told = [line for line in lines if line.endswith("lines of the log could not be written)")]
    assert written[:2] == ["INFO 0", "INFO 1"]
    assert len(written) + sum(int(line.strip("(").split()[0]) for line in told) == 5000


def test_a_log_that_cannot_be_written_is_no_error() -> None:
    with open("/dev/full", "w") as full:
        logger, handler = logger_to(full.fileno())
        logger.error("nobody will know")
        handler.flush()
        reading, writing = os.pipe()
        os.dup2(writing, full.fileno())  # it can be written again, and whoever writes is still there
        os.close(writing)
        logger.error("later")
        handler.flush()
    with open(reading) as log:
        assert log.read().splitlines() == ["(1 lines of the log could not be written)", "ERROR later"]


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise ConfigError('no')"])
def test_a_process_says_all_that_it_has_to_say_before_it_ends(end: str) -> None:
    program = f"""
        import logging, sys
        from stagecoach.errors import ConfigError
        from stagecoach.process import lifecycle
        from stagecoach.process.logs import configure_logging
        configure_logging("info")
        async def main(stop):
            for number in range(200):
                logging.info("line %d", number)
            {end}
        sys.exit(lifecycle.run("prog", main))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    lines = ended.stderr.splitlines()
    assert [line.rpartition("line ")[2] for line in lines[:200]] == [str(number) for number in range(200)]
    assert lines[200:] == (["prog: error: no"] if "ConfigError" in end else [])


def test_a_process_whose_standard_error_nobody_reads_does_its_work_and_ends() -> None:
    program = """
        import logging, os, signal, sys
        from stagecoach.process import lifecycle
        from stagecoach.process.logs import configure_logging
        configure_logging("info")
        async def main(stop):
            for number in range(5000):
                logging.info("line %d", number)
            print("worked", flush=True)
            await stop.wait()
        sys.exit(lifecycle.run("prog", main))
    """
    with (
        full_pipe() as (_, writing),
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=writing
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"worked\n"
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0

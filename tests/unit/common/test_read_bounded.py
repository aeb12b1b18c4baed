"""Reading a file within a bound."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from stagecoach.security.watched_files import read_bounded


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_a_file_within_the_bound_is_read_whole(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(bytes(range(size)))
    assert read_bounded(tmp_path / "file", 100) == bytes(range(size))


def test_of_a_larger_one_only_what_shows_that_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    assert len(read_bounded(tmp_path / "file", 100)) == 101


def test_a_large_bound_costs_a_small_file_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"small")
    tracemalloc.start()
    read_bounded(tmp_path / "file", 1 << 30)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_file_whose_size_the_system_does_not_tell_is_read_whole() -> None:
    assert len(read_bounded(Path("/proc/self/status"), 1 << 20)) > 100


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_bounded(tmp_path / "pipe", 100)

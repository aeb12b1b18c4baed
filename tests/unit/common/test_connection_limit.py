"""A server that strangers reach takes no more connections than leave it files for everything else."""

from __future__ import annotations

import resource

import pytest

from stagecoach.process.listener import MAX_CONNECTIONS, max_connections


@pytest.mark.parametrize(
    ("soft_limit", "expected"),
    [(1024, 512), (2**20, MAX_CONNECTIONS), (resource.RLIM_INFINITY, MAX_CONNECTIONS), (1, 1)],
)
def test_it_takes_half_of_the_open_files(monkeypatch: pytest.MonkeyPatch, soft_limit: int, expected: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft_limit, soft_limit))
    assert max_connections() == expected

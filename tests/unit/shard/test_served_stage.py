"""Leases on a stage: what one of them takes comes back, however it ends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz import fake_shard


def test_a_lease_that_there_is_no_memory_for_takes_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for its tables")

    shard = fake_shard.first_and_last()
    request = fake_shard.open_request(shard.runner.stage).open
    with monkeypatch.context() as patched:
        patched.setattr("stagecoach_shard.leases.served_stage.Lease", no_memory)
        with pytest.raises(MemoryError):
            shard.stage.open(request)
    assert shard.stage.num_free_blocks(0) == fake_shard.NUM_BLOCKS
    assert shard.stage.open(request).lease.num_blocks == fake_shard.NUM_BLOCKS

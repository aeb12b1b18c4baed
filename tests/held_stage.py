"""Stages whose compute threads stand still while a test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stagecoach_shard.runtime.stage import Stage

MAX_HOLD_S = 20.0


@contextmanager
def held_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every stage of this process computes while the event is set, which it is at first."""
    goes_on = threading.Event()
    goes_on.set()
    forward = Stage.forward

    def when_allowed(self, *arguments):  # type: ignore[no-untyped-def]
        assert goes_on.wait(MAX_HOLD_S), "held for too long"
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "forward", when_allowed)
        try:
            yield goes_on
        finally:
            goes_on.set()

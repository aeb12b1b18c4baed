"""The files of a client's TLS: an event loop waits for none of them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import grpc
import pytest

from stagecoach.errors import ConfigError
from stagecoach_client import AsyncClient, Tls


async def test_a_client_whose_disk_hangs_says_so_and_its_event_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    is_there = threading.Event()
    monkeypatch.setattr("stagecoach.file_access.FILE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(Tls, "credentials", lambda self: is_there.wait())
    async with AsyncClient("127.0.0.1:1", tls=Tls(Path("/mnt/gone/ca.pem"))) as client:
        calls = [asyncio.create_task(client.models()) for _ in range(2)]
        turns = 0
        while not all(call.done() for call in calls):
            await asyncio.sleep(0)
            turns += 1
        assert turns > 1000
        for call in calls:
            with pytest.raises(ConfigError, match=r"/mnt/gone/ca\.pem could not be read"):
                call.result()
    is_there.set()


async def test_a_client_that_is_closed_while_it_reads_its_files_does_not_connect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_there, asked = threading.Event(), threading.Event()

    def credentials(_: Tls) -> grpc.ChannelCredentials:
        asked.set()
        is_there.wait()
        return grpc.ssl_channel_credentials()

    monkeypatch.setattr(Tls, "credentials", credentials)
    client = AsyncClient("127.0.0.1:1", tls=Tls())
    call = asyncio.create_task(client.models())
    await asyncio.to_thread(asked.wait, 10)
    await client.aclose()
    is_there.set()
    with pytest.raises(RuntimeError, match="closed"):
        await call

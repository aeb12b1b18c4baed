"""Servers whose standard error nobody reads, or that have none: they serve, and end when they are told to."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stagecoach.rpc.health import LIVENESS
from stagecoach.security.tls import ROUTER_NAME, name_override
from stagecoach_local.certificates import ClusterCertificates, issue_cluster
from tests.cluster import free_port
from tests.e2e.processes import command

TIMEOUT_S = 30.0


@contextmanager
def server(port: int, *flags: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A router that waits for shards, with these standard streams."""
    arguments = command("stagecoach-router", "--shards", "127.0.0.1:1", "--listen", f"127.0.0.1:{port}", *flags)
    with subprocess.Popen(arguments, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def is_alive(channel: grpc.Channel) -> bool:
    try:
        answer = HealthStub(channel).Check(HealthCheckRequest(service=LIVENESS), timeout=5)
    except grpc.RpcError:
        return False
    return bool(answer.status == HealthCheckResponse.SERVING)


def wait_until_alive(channel: grpc.Channel) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_alive(channel):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def channel_of(port: int, own: Any, issued: ClusterCertificates) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(issued.ca.read_bytes(), own.key.read_bytes(), own.cert.read_bytes())
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, name_override(ROUTER_NAME))


def test_strangers_cannot_stop_a_server_whose_standard_error_nobody_reads(tmp_path):
    """Of each handshake that fails, gRPC writes a line there, from the threads that it also answers with."""
    issued, others = issue_cluster(tmp_path / "own"), issue_cluster(tmp_path / "others")
    files = {"tls-cert": issued.router.cert, "tls-key": issued.router.key, "tls-ca": issued.ca}
    flags = [part for name, file in (files | {"tls-client-ca": issued.ca}).items() for part in (f"--{name}", str(file))]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    port = free_port()
    with server(port, *flags, stderr=writing) as process, channel_of(port, issued.router, issued) as channel:
        wait_until_alive(channel)
        for _ in range(20):
            with channel_of(port, others.router, issued) as stranger:
                assert not is_alive(stranger)
        with channel_of(port, issued.router, issued) as anew:
            assert is_alive(anew)
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
    os.close(writing)
    os.close(reading)


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_a_server_needs_no_standard_streams(closed):
    port = free_port()

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    with server(port, preexec_fn=close) as process, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        wait_until_alive(channel)
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0
